"""Bad tables of matched points, given to main_ddp.py, and bad embeddings, given to mine_pairs.py."""

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.fault_kinds.attempt import DAMAGES, Attempt, Faults, Good
from datasets.samples.correspondence_files import HEADER_FILE, OLD_ROW_DTYPE, ROWS_FILE, checksum_of_rows
from datasets.samples.correspondences import CorrespondenceTable

NO_NUMBER = (None, "5", [], {}, 1.5, -1, 10**30, True)
Change = Callable[[Path, random.Random], None]  # changes a copy of a good folder


# Tables


def in_rows(change: Callable[[bytes, random.Random], bytes]) -> Change:
    """Another file of rows."""

    def apply(folder: Path, rng: random.Random) -> None:
        (folder / ROWS_FILE).write_bytes(change((folder / ROWS_FILE).read_bytes(), rng))

    return apply


def in_header(change: Callable[[bytes, random.Random], bytes]) -> Change:
    """Another header file."""

    def apply(folder: Path, rng: random.Random) -> None:
        (folder / HEADER_FILE).write_bytes(change((folder / HEADER_FILE).read_bytes(), rng))

    return apply


def header_with(change: Callable[[dict, random.Random], object]) -> Change:
    """The header with another value."""
    return in_header(lambda content, rng: json.dumps(change(json.loads(content), rng)).encode())


def other_array(make: Callable[[np.ndarray, random.Random], np.ndarray]) -> Change:
    """Other rows under a header that was made for them: only their meaning is wrong."""

    def apply(folder: Path, rng: random.Random) -> None:
        rows = make(np.load(folder / ROWS_FILE), rng)
        np.save(folder / ROWS_FILE, rows)
        header = json.loads((folder / HEADER_FILE).read_text())
        if rows.ndim == 1 and rows.dtype.names:
            header |= {"num_rows": len(rows), "rows_crc32": checksum_of_rows(rows)}
        (folder / HEADER_FILE).write_text(json.dumps(header))

    return apply


def with_values(field: str, values: tuple) -> Callable[[np.ndarray, random.Random], np.ndarray]:
    def change(rows: np.ndarray, rng: random.Random) -> np.ndarray:
        rows = rows.copy()
        rows[field][rng.randrange(len(rows))] = rng.choice(values)
        return rows

    return change


def moved(rows: np.ndarray, rng: random.Random) -> np.ndarray:
    """All points of a case somewhere else."""
    rows = rows.copy()
    rows["query_mm"][rows["query_case"] == rng.choice(rows["query_case"])] += rng.choice((1e3, -1e4, 1e7))
    return rows


def lost_file(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice((ROWS_FILE, HEADER_FILE))).unlink()


def without_key(header: dict, rng: random.Random) -> dict:
    del header[rng.choice(list(header))]
    return header


def other_sources(header: dict, rng: random.Random) -> dict:
    """Points that were found in other volumes."""
    name = rng.choice(header["case_names"])
    header["sources"][name] = "store:" + "0" * 32 + ":00000000:" + "0" * 32
    return header


def other_names(header: dict, rng: random.Random) -> dict:
    return header | {"case_names": [f"stranger{number}" for number in range(len(header["case_names"]))], "sources": {}}


def archive(content: bytes, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, rows=np.load(io.BytesIO(content)))
    return buffer.getvalue()


NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TABLE_CHANGES: dict[str, Change] = {
    **{f"rows: {name}": in_rows(damage) for name, damage in DAMAGES.items()},
    **{f"header: {name}": in_header(damage) for name, damage in DAMAGES.items()},
    "rows as .npz": in_rows(archive),
    "rows of numbers": other_array(lambda rows, rng: np.zeros((len(rows), 11), np.float32)),
    "rows of objects": other_array(lambda rows, rng: np.array([{"a": 1}] * len(rows), object)),
    "rows in two dimensions": other_array(lambda rows, rng: rows.reshape(2, -1)),
    "big-endian rows": other_array(lambda rows, rng: rows.astype(rows.dtype.newbyteorder(">"))),
    "rows of format 1": other_array(lambda rows, rng: rows[list(OLD_ROW_DTYPE.names)].astype(OLD_ROW_DTYPE)),
    "no rows": other_array(lambda rows, rng: rows[:0]),
    "rows in another order": other_array(lambda rows, rng: rows[::-1]),
    "unknown case": other_array(with_values("key_case", (-1, 999, 2**31 - 1))),
    "point not finite": other_array(with_values("query_mm", NOT_FINITE)),
    "match not finite": other_array(with_values("key_mm", NOT_FINITE)),
    "score not finite": other_array(with_values("score", NOT_FINITE)),
    "points outside of their volumes": other_array(moved),
    "a file is missing": lost_file,
    "key is missing": header_with(without_key),
    "header is no object": header_with(lambda header, rng: rng.choice(([header], 5, None, "x"))),
    "version": header_with(lambda header, rng: header | {"format_version": rng.choice((0, 3, "2", None, 2.5))}),
    "number of rows": header_with(lambda header, rng: header | {"num_rows": rng.choice(NO_NUMBER)}),
    "checksum": header_with(lambda header, rng: header | {"rows_crc32": rng.choice(NO_NUMBER)}),
    "offsets": header_with(
        lambda header, rng: header | {"offsets": rng.choice(([], [0], ["a"], [0, 10**30], None, {}, [1.5]))}
    ),
    "case names": header_with(
        lambda header, rng: header | {"case_names": rng.choice(([], [5], "abc", None, ["a", "a"]))}
    ),
    "sources": header_with(lambda header, rng: header | {"sources": rng.choice((None, [], {"a": 5}, 5))}),
    "other volumes": header_with(other_sources),
    "other cases": header_with(other_names),
}


def table_fault(change: Change) -> Callable[[Good, Path, random.Random], Attempt]:
    """A table with something wrong."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        table = folder / "table"
        shutil.copytree(good.corpus / "embeddings", table)
        change(table, rng)
        given = good.training_words(folder / "run", embed_dir=table, pairing="sam")
        return Attempt(
            "main_ddp", given, (ROWS_FILE, HEADER_FILE, str(table)), lambda printed: is_same(table, good, printed)
        )

    return make


def is_same(table: Path, good: Good, printed: str) -> bool:
    """Whether the table says what the good one says, or a warning names what it lacks."""
    ours, theirs = (CorrespondenceTable.load(folder) for folder in (table, good.corpus / "embeddings"))
    if ours.case_names != theirs.case_names:
        return False
    fields = OLD_ROW_DTYPE.names
    is_equal = len(ours) == len(theirs) and all(np.array_equal(ours.rows[name], theirs.rows[name]) for name in fields)
    return is_equal or "WARNING" in printed


# Embeddings


def rewritten(change: Callable[[dict, dict, random.Random], None]) -> Change:
    """A file whose tensors or description were changed before it was written."""

    def apply(path: Path, rng: random.Random) -> None:
        with safe_open(path, framework="pt") as stored:
            header = dict(stored.metadata())
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        change(tensors, header, rng)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=header)

    return apply


def drop_description(tensors: dict, header: dict, rng: random.Random) -> None:
    del header[rng.choice(["format", "name", "fingerprint", "fine_affine", "coarse_affine"])]


def drop_tensor(tensors: dict, header: dict, rng: random.Random) -> None:
    del tensors[rng.choice(["fine", "coarse"])]


def change_affine(tensors: dict, header: dict, rng: random.Random) -> None:
    wrong = (
        "",
        "x",
        "[]",
        "5",
        "null",
        "[[1, 0], [0, 1]]",
        json.dumps(np.full((4, 4), np.nan).tolist()),
        json.dumps([[0] * 4] * 4),
    )
    header[rng.choice(["fine_affine", "coarse_affine"])] = rng.choice(wrong)


def change_shape(tensors: dict, header: dict, rng: random.Random) -> None:
    name = rng.choice(["fine", "coarse"])
    tensors[name] = rng.choice([tensors[name][0], tensors[name][:3], tensors[name][:, :0], tensors[name].flatten()])


def change_type(tensors: dict, header: dict, rng: random.Random) -> None:
    name = rng.choice(["fine", "coarse"])
    tensors[name] = tensors[name].to(rng.choice([torch.int32, torch.uint8, torch.bool, torch.int64]))


def put_value(tensors: dict, header: dict, rng: random.Random) -> None:
    values = tensors[rng.choice(["fine", "coarse"])]
    values.view(-1)[rng.randrange(values.numel())] = rng.choice(NOT_FINITE)


def change_name(tensors: dict, header: dict, rng: random.Random) -> None:
    header["name"] = rng.choice(("small0", "", "../small1", "another"))


def in_bytes(damage: Callable[[bytes, random.Random], bytes]) -> Change:
    def apply(path: Path, rng: random.Random) -> None:
        path.write_bytes(damage(path.read_bytes(), rng))

    return apply


EMBEDDING_CHANGES: dict[str, Change] = {
    **{name: in_bytes(damage) for name, damage in DAMAGES.items()},
    "no description": rewritten(lambda tensors, header, rng: header.clear()),
    "a part of the description": rewritten(drop_description),
    "other format": rewritten(
        lambda tensors, header, rng: header.update(format=rng.choice(("x", "", "sam_embed.embedding.9")))
    ),
    "compact without codes": rewritten(lambda tensors, header, rng: header.update(format="sam_embed.embedding.2")),
    "compact codes": rewritten(
        lambda tensors, header, rng: header.update(
            format="sam_embed.embedding.2", compact=rng.choice(("", "{}", "5", "null"))
        )
    ),
    "a tensor is missing": rewritten(drop_tensor),
    "affine": rewritten(change_affine),
    "shape": rewritten(change_shape),
    "type": rewritten(change_type),
    "not finite": rewritten(put_value),
    "other weights": rewritten(lambda tensors, header, rng: header.update(fingerprint="0" * 16)),
    "other name": rewritten(change_name),
}


def embedding_fault(change: Change) -> Callable[[Good, Path, random.Random], Attempt]:
    """One of two embeddings with something wrong."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        embeddings = folder / "embeddings"
        embeddings.mkdir()
        for path in (good.folder / "embeddings").glob("*.safetensors"):
            shutil.copy(path, embeddings)
        change(embeddings / "small1.safetensors", rng)

        def is_right(printed: str) -> bool:
            ours, theirs = (CorrespondenceTable.load(found) for found in (embeddings, good.folder / "embeddings"))
            return (
                np.array_equal(ours.rows, theirs.rows, equal_nan=False) or ours.rows.tobytes() == theirs.rows.tobytes()
            )

        return Attempt("scripts.mine_pairs", good.mining_words(embeddings), ("small1",), is_right)

    return make


TABLE_FAULTS: Faults = {name: table_fault(change) for name, change in TABLE_CHANGES.items()}
EMBEDDING_FAULTS: Faults = {name: embedding_fault(change) for name, change in EMBEDDING_CHANGES.items()}
