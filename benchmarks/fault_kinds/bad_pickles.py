"""Bad pickles: such as carry code, in every place where one may be given, and damaged ones.

The code that they carry makes a file, so that it shows if one was run.
"""

import io
import os
import pickle
import random
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.fault_kinds.attempt import DAMAGES, Attempt, Faults, Good
from benchmarks.results import words
from sam_embed.embeddings.embedding_store import load_embedding

CODE_AT = "ran"  # name of the file that shows it
WIDTH = 4
FINE, COARSE = (10, 16, 16), (5, 2, 2)  # grids of a published embedding of the small CT


class Calls:
    """Pickles into a call."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def python(marker: Path) -> str:
    return f"__import__('pathlib').Path({str(marker)!r}).touch()"


PAYLOADS: dict[str, Callable[[Path], object]] = {
    "os.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "exec": lambda marker: Calls(exec, python(marker)),
    "eval": lambda marker: Calls(eval, python(marker)),
    "subprocess": lambda marker: Calls(subprocess.check_call, ["touch", str(marker)]),
    "open": lambda marker: Calls(open, str(marker), "w"),
    "mkdir": lambda marker: Calls(os.mkdir, str(marker)),
    "nested pickle": lambda marker: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {marker}"))),
    "torch.load": lambda marker: Calls(
        torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {marker}"))
    ),
    "map of exec": lambda marker: Calls(list, Calls(map, exec, [python(marker)])),
}


def code_of_opcodes(marker: Path, rng: random.Random) -> bytes:
    """Opcodes that no pickler writes today."""
    text = f"touch {marker}".encode()
    return rng.choice(
        (
            b"(S'" + text + b"'\nios\nsystem\n.",
            b"(cos\nsystem\nS'" + text + b"'\no.",
            b"cos\nsystem\n(S'" + text + b"'\ntR.",
            b"cposix\nsystem\n(S'" + text + b"'\ntR.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
            b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c" + bytes([len(text)]) + text + b"\x85R.",
        )
    )


def payload(marker: Path, rng: random.Random) -> tuple[object, bytes]:
    """An object that runs code when it is loaded, and a pickle that does."""
    made = PAYLOADS[rng.choice(list(PAYLOADS))](marker)
    if rng.random() < 0.25:
        return made, code_of_opcodes(marker, rng)
    hidden = rng.choice(
        (made, [made], {"student": made, "kind": "alice"}, published(0) + [made], {"state_dict": {"a": made}})
    )
    return hidden, pickle.dumps(hidden, protocol=rng.randrange(0, 6))


def as_torch_file(content: object, rng: random.Random) -> bytes:
    """As torch.save writes it, today or before version 1.6."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    return buffer.getvalue()


def hostile_file(path: Path, rng: random.Random) -> Path:
    """Write a file that carries code; the file that this code would make."""
    marker = path.parent / CODE_AT
    made, pickled = payload(marker, rng)
    form = rng.choice(("pickle", "torch", "torch zip"))
    if form == "pickle":
        path.write_bytes(pickled)
    elif form == "torch":
        path.write_bytes(as_torch_file(made, rng))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    return marker


def published(seed: int) -> list[np.ndarray]:
    """The arrays of a published embedding of a small CT."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, WIDTH, *grid)).astype(np.float32) for grid in (FINE, COARSE)]


def importing(good: Good, folder: Path, content: bytes, **more: object) -> Attempt:
    """import_embeddings.py with one pickle."""
    pickles = folder / "pickles"
    pickles.mkdir(exist_ok=True)
    (pickles / "small0.pkl").write_bytes(content)
    given = words(pickle_dir=pickles, embed_dir=folder / "embeddings", data_dir=good.folder / "small", storage="fp16")

    def is_right(printed: str) -> bool:
        """Nothing but the arrays of the good pickle."""
        found, wanted = (
            load_embedding(folder / "embeddings", "small0").fine.float(),
            torch.from_numpy(published(0)[0][0]),
        )
        return torch.allclose(found, torch.nn.functional.normalize(wanted, dim=0), atol=1e-2)

    return Attempt("scripts.import_embeddings", given, ("small0.pkl",), is_right, **more)


def code_in_embedding(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A published embedding that carries code."""
    (folder / "pickles").mkdir()
    marker = hostile_file(folder / "pickles/small0.pkl", rng)
    return importing(good, folder, (folder / "pickles/small0.pkl").read_bytes(), marker=marker)


def code_in_folder(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A run's own checkpoint carries code."""
    marker = hostile_file(folder / "checkpoint.pth", rng)
    return Attempt("main_ddp", good.training_words(folder), (str(folder / "checkpoint.pth"),), None, marker)


def code_in(
    make: Callable[[Good, Path, Path], tuple[str, tuple[str, ...]]],
) -> Callable[[Good, Path, random.Random], Attempt]:
    """A file of weights that carries code; `make(good, folder, file)` -> entry point and words."""

    def attempt(good: Good, folder: Path, rng: random.Random) -> Attempt:
        path = folder / "weights.pth"
        marker = hostile_file(path, rng)
        module, given = make(good, folder, path)
        return Attempt(module, given, (str(path),), None, marker)

    return attempt


def code_in_table(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A table whose rows are pickled objects."""
    marker, table = folder / CODE_AT, folder / "table"
    table.mkdir()
    array = np.array([payload(marker, rng)[0]], object)
    np.save(table / "correspondences.npy", array, allow_pickle=True)
    (table / "correspondences.json").write_bytes((good.corpus / "embeddings/correspondences.json").read_bytes())
    given = good.training_words(folder / "run", embed_dir=table, pairing="sam")
    return Attempt("main_ddp", given, ("correspondences.npy",), None, marker)


def code_in_config(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A recipe whose YAML asks for Python objects."""
    marker, config = folder / CODE_AT, folder / "recipe.yaml"
    command = f"touch {marker}"
    tags = (
        "!!python/object/apply:os.system",
        "!!python/object/new:os.system",
        "!!python/object/apply:subprocess.getoutput",
    )
    config.write_text(f"lr: {rng.choice(tags)} [{command!r}]\n")
    names = (str(config), "recipe.yaml", "--lr", "python/object")
    return Attempt("main_ddp", ("--config", str(config), *good.training_words(folder / "run")), names, None, marker)


def damaged_pickle(damage: Callable[[bytes, random.Random], bytes]) -> Callable[[Good, Path, random.Random], Attempt]:
    """A published embedding whose file was damaged; single flipped bits only outside of the arrays' values."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        content = pickle.dumps(published(0), protocol=4)
        if damage is DAMAGES["a flipped bit"]:
            return importing(good, folder, damage(content[:150], rng) + content[150:])
        return importing(good, folder, damage(content, rng))

    return make


def other_content(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A pickle of something else."""
    fine, coarse = published(0)
    bad_fine = fine.copy()
    bad_fine.flat[rng.randrange(fine.size)] = rng.choice((float("nan"), float("inf")))
    choices = (
        *(None, 5, "text", [], {}, [fine], [fine, fine], [coarse, coarse], {"fine": fine, "coarse": coarse}),
        *([fine[0, 0], coarse[0, 0]], [fine[..., :-3], coarse], [fine, coarse[:, :-1]], [bad_fine, coarse]),
        *([fine.astype(np.int32), coarse.astype(np.int32)], [fine.astype(complex), coarse], [fine, coarse, "a", "b"]),
        *(
            [fine, coarse, "small1"],
            [fine[:, :0], coarse[:, :0]],
            [fine.astype(object), coarse],
            [fine, coarse, fine, fine],
        ),
    )
    return importing(good, folder, pickle.dumps(rng.choice(choices), protocol=rng.randrange(0, 6)))


def bomb(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A short pickle that would take all memory or the whole stack."""
    laughs: list = []
    for _ in range(rng.choice((30, 60))):
        laughs = [laughs, laughs]
    content = rng.choice(
        (
            pickle.dumps(laughs),
            b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
            b"\x80\x04Nr\xff\xff\xff\x7f.",
            b"\x80\x04\x8e" + (2**40).to_bytes(8, "little"),
            b"\x80\x04\x8b" + (2**31 - 1).to_bytes(4, "little"),
        )
    )
    return importing(good, folder, content)


FAULTS: Faults = {
    "code in an embedding": code_in_embedding,
    "code in --resume": code_in(
        lambda good, folder, path: ("main_ddp", good.training_words(folder / "run", resume=path))
    ),
    "code in --checkpoint_file": code_in(
        lambda good, folder, path: ("main_ddp", good.training_words(folder / "run", checkpoint_file=path))
    ),
    "code in a run's folder": code_in_folder,
    "code in what is extracted": code_in(
        lambda good, folder, path: ("extract_backbone_weights", (str(path), str(folder / "out.pth")))
    ),
    "code in SAM's weights": code_in(
        lambda good, folder, path: (
            "scripts.generate_sam_embeddings",
            good.embedding_words(folder / "embeddings", checkpoint_file=path),
        )
    ),
    "code in a segmenter": code_in(
        lambda good, folder, path: (
            "scripts.predict",
            (str(good.folder / "small/small0.nii.gz"), str(folder / "out.nii.gz"), "--checkpoint_file", str(path)),
        )
    ),
    "code in a table": code_in_table,
    "code in a recipe": code_in_config,
    **{name: damaged_pickle(damage) for name, damage in DAMAGES.items()},
    "other content": other_content,
    "bomb": bomb,
}
