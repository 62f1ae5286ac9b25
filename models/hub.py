"""Weights on the Hugging Face hub, by one name wherever a weights file is asked for: `hf://owner/name`.

    hf://owner/name                       model.safetensors of the newest revision
    hf://owner/name@v1.0/other.pth        another file, of a branch, tag or commit

Files are downloaded once, into the cache of huggingface_hub (HF_HOME). Private repositories need its login
(`hf auth login`, or HF_TOKEN). With HF_HUB_OFFLINE=1 only the cache is asked.
"""

import contextlib
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError

HUB = "hf://"
WEIGHTS_NAME = "model.safetensors"
NAME = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")


class HubError(ValueError):
    """A file of the hub that cannot be had; the message names it and says what to do."""


def is_on_hub(path: str | Path) -> bool:
    """Whether a weights file is named by its place on the hub."""
    return str(path).startswith(HUB)


def local_weights(path: str | Path) -> Path:
    """The weights file on this machine: the path itself, or what is downloaded (or cached) for a name on the hub.

    The description beside a .pth (`<file>.json`) comes with it.

    Raises:
        HubError: a name of another form, no such repository, revision or file, or the hub cannot be reached.
    """
    if not is_on_hub(path):
        return Path(path)
    name = NAME.fullmatch(str(path))
    if name is None:
        raise HubError(f"{path}: expected hf://owner/name, hf://owner/name/file or hf://owner/name@revision/file")
    repo, revision, file = name["repo"], name["revision"], name["file"] or WEIGHTS_NAME
    try:
        found = huggingface_hub.hf_hub_download(repo, file, revision=revision)
        if not file.endswith(".safetensors"):
            with contextlib.suppress(EntryNotFoundError):
                huggingface_hub.hf_hub_download(repo, f"{file}.json", revision=revision)
    except (OSError, HTTPError, EntryNotFoundError, HFValidationError) as error:
        raise HubError(
            f"{path}: {file} cannot be had from the hub ({str(error).strip().splitlines()[0]}). Is the name right, is "
            "the hub within reach, and are you logged in where the repository is private (hf auth login)?"
        ) from error
    return Path(found)
