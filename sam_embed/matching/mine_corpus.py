"""Mining a whole corpus into one table: shared out over processes, resumable, and no more work than has changed.

A query case's rows are one small file, `<table>/mined/<case>.<digest>.npy`. Its digest covers all that decides these
rows: the settings, the weights, and the CT of the case and of its partners. So a killed run continues where it was,
several processes share the work, and a case more or a corrected CT is mined anew together with its neighbours on the
circle only. The files are joined into the table and stay beside it.
"""

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets.samples.correspondence_files import FORMAT_VERSION
from datasets.samples.correspondences import CorrespondenceTable
from datasets.store.files import write_bytes
from sam_embed.embeddings.embedding_store import EmbeddingCache, common_weights, stored_header
from sam_embed.matching.mine import MiningOptions, circles_of, mine_case, partners_on

SHARD_FOLDER = "mined"
POLL_S = 0.5  # between two looks into the folder
WAIT_LIMIT_S = 3600.0  # without any new file from the other processes


@dataclass(frozen=True)
class Shard:
    """The rows of one query case, in their own file.

    Attributes:
        query: the case.
        partners: its key cases, in the order in which they are best read.
        path: the file. Its rows' case numbers index `names`.
    """

    query: str
    partners: tuple[str, ...]
    path: Path

    @property
    def names(self) -> list[str]:
        """The cases that occur, in an order that no other case changes."""
        return [self.query, *sorted(self.partners)]

    def rows(self, number_of: Mapping[str, int]) -> np.ndarray:
        """The rows, with the case numbers of a whole table."""
        rows = np.load(self.path)
        numbers = np.array([number_of[name] for name in self.names], dtype=np.int32)
        for field in ("query_case", "key_case"):
            rows[field] = numbers[rows[field]]
        return rows


def mine_corpus(
    embed_dir: str | Path,
    names: Sequence[str],
    output_dir: str | Path,
    options: MiningOptions,
    provenance: dict | None = None,
    cache_mb: float = 2048,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    sections: Sequence[Sequence[str]] = (),
    patient_of: Mapping[str, str] | None = None,
) -> CorrespondenceTable | None:
    """Mine this rank's share of the cases; rank 0 then waits for the others and joins everything into one table.

    Args:
        embed_dir: folder of the embeddings.
        names: cases to mine, as queries and as keys; at least two.
        output_dir: the table's folder; each case's rows lie in `mined/` below it. A table that is up to date stays.
        options: what to mine.
        provenance: plain values to state in the table beside the options.
        cache_mb: embeddings kept in memory, beside the two in use.
        device: where to match.
        sections: parts of `names` (sections of a data list) whose cases are paired among themselves, so that held-out
            cases meet held-out ones; empty = all with all.
        patient_of: case -> patient; scans of one patient are not paired with each other.

    Returns:
        The table on rank 0, None elsewhere.
    """
    names = sorted(names)
    if len(names) < 2:
        raise ValueError(f"{embed_dir}: mining needs at least 2 embedded cases, found {len(names)} (--embed_dir)")
    headers = {name: stored_header(embed_dir, name) for name in names}
    fingerprint = common_weights(embed_dir, headers)
    sources = {name: header.get("source", "") for name, header in headers.items()}
    settings = {**dataclasses.asdict(options), "fingerprint": fingerprint, "format": FORMAT_VERSION}
    shards = _shards_on_circles(names, sections, patient_of, options, Path(output_dir), settings, sources)
    digest = _digest([shard.path.name for shard in shards])
    if table := _finished_table(output_dir, digest):
        return table if rank == 0 else None
    cache = EmbeddingCache(embed_dir, cache_mb)
    arc = shards[len(shards) * rank // world_size : len(shards) * (rank + 1) // world_size]
    for shard in tqdm(arc, desc="mining", unit="case", disable=rank > 0):
        if not shard.path.exists():
            buffer = io.BytesIO()
            np.save(buffer, mine_case(cache, shard.names, shard.query, shard.partners, options, device))
            write_bytes(shard.path, buffer.getbuffer())
    if rank > 0:
        return None
    _wait_for([shard.path for shard in shards])
    number_of = {name: number for number, name in enumerate(names)}
    rows = np.concatenate([shard.rows(number_of) for shard in sorted(shards, key=lambda shard: shard.query)])
    stated = {**dataclasses.asdict(options), "weights": fingerprint, "digest": digest, **(provenance or {})}
    table = CorrespondenceTable.write(output_dir, names, rows, stated, sources)
    for left in {*(Path(output_dir) / SHARD_FOLDER).glob("*.npy")} - {shard.path for shard in shards}:
        left.unlink(missing_ok=True)  # of other settings or an older CT
    return table


def _shards_on_circles(
    names: Sequence[str],
    sections: Sequence[Sequence[str]],
    patient_of: Mapping[str, str] | None,
    options: MiningOptions,
    output_dir: Path,
    settings: dict,
    sources: Mapping[str, str],
) -> list[Shard]:
    """A shard for each case, in the order of the circles.

    Args:
        settings: all that decides the rows of every case.
        sources: case name -> identity of the CT behind its embedding.
    """
    circle_by_name = circles_of(names, sections, options.seed)
    circles = {id(circle): circle for circle in circle_by_name.values()}.values()
    shards = []
    for circle in circles:
        for position, name in enumerate(circle):
            if circle_by_name[name] is not circle:
                continue
            partners = partners_on(circle, name, options.num_partners, patient_of)
            digest = _digest({**settings, "sources": {case: sources[case] for case in (name, *partners)}})
            if position % 2:
                partners.reverse()  # there and back: a cache too small for all partners still holds the last ones
            shards.append(Shard(name, tuple(partners), output_dir / SHARD_FOLDER / f"{name}.{digest}.npy"))
    return shards


def _digest(plain: dict | list) -> str:
    """Changes with every value, so that old files are not mistaken for new ones."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def _finished_table(output_dir: str | Path, digest: str) -> CorrespondenceTable | None:
    """The table that is there, if it is sound and of just these rows."""
    try:
        table = CorrespondenceTable.load(output_dir)
    except ValueError:  # none, or a damaged one
        return None
    return table if table.provenance.get("digest") == digest else None


def _wait_for(files: list[Path]) -> None:
    """Until all files of one folder are there; gives up when none has appeared for an hour."""
    folder, wanted = files[0].parent, {file.name for file in files}
    num_missing, last_news = len(wanted) + 1, time.monotonic()
    # One listing a time: a look at each file is slow on NFS.
    while missing := wanted - {file.name for file in folder.iterdir()}:
        if len(missing) < num_missing:
            num_missing, last_news = len(missing), time.monotonic()
        if time.monotonic() - last_news > WAIT_LIMIT_S:
            raise ValueError(
                f"{folder}: {len(missing)} of {len(files)} cases were not mined by the other processes, first "
                f"{min(missing)}; run the command again to mine the rest"
            )
        time.sleep(POLL_S)
