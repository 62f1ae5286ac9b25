"""A bad input, ready to be given to the entry point that reads it, and the good ones that it is made from."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.fault_kinds.processes import start, wait_for
from benchmarks.fault_kinds.toy import toy_flags
from benchmarks.results import words
from datasets.ct.nifti import write_nifti
from datasets.lists.data_list import Case, write_data_list
from sam_embed.checkpoint import EmbedderInfo, embedder_checkpoint
from sam_embed.network import AnatomicalEmbedder

LIMIT_S = 300.0
ONE_STEP = {"epochs": 1, "steps_per_epoch": 1, "warmup_epochs": 0, "val_freq": 0, "keep_freq": 0}
METHOD = "alice"  # of the good checkpoint
SAM_OPTIONS = {"width": 8, "embed_dim": 8}
SMALL_SHAPE, SMALL_MM = (20, 32, 32), 2.0  # of the CT that embeddings are made of


@dataclass(frozen=True)
class Attempt:
    """A command line with something wrong.

    Attributes:
        module, words: the entry point and what follows it.
        names: a refusal must hold one of these: a file's name, or a flag.
        is_right: what the command made -> whether it took the input for what it is; None = it must refuse. Gets what
            the command printed.
        marker: a file that appears if code in the input was run.
    """

    module: str
    words: tuple[str, ...]
    names: tuple[str, ...]
    is_right: Callable[[str], bool] | None = None
    marker: Path | None = None


@dataclass(frozen=True)
class Good:
    """Good inputs of every kind, made once in a folder.

    Attributes:
        corpus: of the toy runs.
        folder: holds `small/` (two small CT), `list.json` (of those), `sam.pth`, `embeddings/`, `radiographs/`,
            `run/checkpoint.pth`.
    """

    corpus: Path
    folder: Path

    @classmethod
    def make(cls, corpus: Path, folder: Path) -> "Good":
        """Make what is missing."""
        good = cls(corpus, folder)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            good._write()
            (folder / "complete").touch()
        return good

    def _write(self) -> None:
        rng = np.random.default_rng(0)
        cases = []
        for number in range(2):
            hu = np.full(SMALL_SHAPE, -1000, np.int16)
            hu[2:-2, 4:-4, 4:-4] = rng.normal(40, 30, (16, 24, 24)).astype(np.int16)
            cases.append(Case(f"small{number}", self.folder / f"small/small{number}.nii.gz"))
            write_nifti(cases[-1].image, hu, np.diag([SMALL_MM] * 3 + [1.0])[:, [2, 1, 0, 3]])
        write_data_list(self.folder / "list.json", self.folder / "small", cases)
        torch.manual_seed(0)
        network = AnatomicalEmbedder(**SAM_OPTIONS)
        torch.save(embedder_checkpoint(network, EmbedderInfo()), self.folder / "sam.pth")
        (self.folder / "radiographs").mkdir()
        for number in range(2):
            pixels = rng.integers(0, 4096, (48, 40)).astype(np.uint16)
            Image.fromarray(pixels).save(self.folder / f"radiographs/chest{number}.png")
        self.call("scripts.generate_sam_embeddings", *self.embedding_words(self.folder / "embeddings"))
        self.call("scripts.mine_pairs", *self.mining_words(self.folder / "embeddings"))
        self.call("main_ddp", *toy_flags(METHOD, self.corpus, self.folder / "run", **ONE_STEP))

    def call(self, module: str, *given: str) -> None:
        """Run an entry point.

        Raises:
            RuntimeError: it failed.
        """
        output = self.folder / "output.txt"
        if wait_for([start(module, given, output)], LIMIT_S) != [0]:
            raise RuntimeError(f"{module} failed on good inputs; see {output}")

    def embedding_words(self, embed_dir: Path, **changed: object) -> tuple[str, ...]:
        """The command line of generate_sam_embeddings.py."""
        given = {"checkpoint_file": self.folder / "sam.pth", "data_dir": self.folder / "small", "embed_dir": embed_dir}
        return words(**given | {"storage": "fp16"} | changed)

    def mining_words(self, embed_dir: Path, **changed: object) -> tuple[str, ...]:
        """The command line of mine_pairs.py."""
        return words(**{"embed_dir": embed_dir, "num_points": 8, "num_partners": 1, "min_score": -1} | changed)

    def training_words(self, output_dir: Path, method: str = METHOD, **changed: object) -> tuple[str, ...]:
        """The command line of a run of one step."""
        return toy_flags(method, self.corpus, output_dir, **ONE_STEP | changed)

    def storing_words(self, store_dir: Path, data_dir: Path, json_list: Path) -> tuple[str, ...]:
        """The command line of prepare_volumes.py."""
        return words(data_dir=data_dir, json_list=json_list, store_dir=store_dir, num_workers=1)


# A family of bad inputs: name of the fault -> good inputs, an empty folder, random numbers -> attempt
Faults = dict[str, Callable[[Good, Path, random.Random], Attempt]]


# Ways to damage bytes


def cut_off(content: bytes, rng: random.Random) -> bytes:
    """A file whose copy was interrupted."""
    return content[: rng.randrange(len(content))]


def with_flipped_bit(content: bytes, rng: random.Random, first: int = 0, end: int | None = None) -> bytes:
    """One bit is another one, in the bytes from `first` up to `end`."""
    changed = bytearray(content)
    changed[rng.randrange(first, len(content) if end is None else end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def garbage(content: bytes, rng: random.Random) -> bytes:
    """Random bytes."""
    return rng.randbytes(rng.choice((1, 10, 1000, 100_000)))


def of_another_kind(content: bytes, rng: random.Random) -> bytes:
    """What people mistake for the right file."""
    html = b"<!DOCTYPE html><html><body>Please log in to download this file</body></html>"
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    return rng.choice((html, lfs, b"", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\x1f\x8b", b"{}", b"\0" * 4096))


DAMAGES = {"cut off": cut_off, "a flipped bit": with_flipped_bit, "garbage": garbage, "another kind": of_another_kind}
