"""Embedding many cases into a folder: shared out over processes, resumable, refused where the weights differ."""

import dataclasses
from pathlib import Path

from tqdm import tqdm

from sam_embed.case_source import CaseSource
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.embeddings.compact import FP16, Storage
from sam_embed.embeddings.embed import embed_volume
from sam_embed.embeddings.embedding_store import is_embedded, save_embedding
from sam_embed.network import AnatomicalEmbedder


def embed_corpus(
    network: AnatomicalEmbedder,
    info: EmbedderInfo,
    cases: CaseSource,
    embed_dir: str | Path,
    memory_mb: float = 2048,
    rank: int = 0,
    world_size: int = 1,
    overwrite: bool = False,
    storage: Storage = FP16,
) -> dict:
    """Write `<embed_dir>/<case>.safetensors` for this rank's share of the cases.

    Args:
        network, info: of `load_embedder`, the network perhaps through `for_inference`.
        cases: all of them; rank r takes every `world_size`-th one, from r on.
        memory_mb: as for `embed_volume`.
        overwrite: embed cases again that have an embedding by the same weights from the same CT.
        storage: form of the files written. Finished cases are kept in whatever form they have: forms may be mixed.

    Returns:
        `written` and `reused` (lists of names) and `failed` (name -> reason: what cannot be read or embedded, as a
        scan of one slice or one too large for the memory, is skipped).

    Raises:
        FileWriteError: the folder cannot be written to, or is full; what is finished stays.
    """
    share = cases.names[rank::world_size]
    source = {name: cases.identity(name) for name in share}
    is_done = {name: not overwrite and is_embedded(embed_dir, name, info.fingerprint, source[name]) for name in share}
    report = {"written": [], "reused": [name for name in share if is_done[name]], "failed": {}}
    missing = [name for name in share if not is_done[name]]
    # Finished cases count as done from the start, so that the remaining time is foretold by the others alone.
    done, total = len(report["reused"]), len(share)
    bar = tqdm(missing, desc="embedding", unit="case", initial=done, total=total, disable=rank > 0)
    for name in bar:
        bar.set_postfix_str(name)
        try:
            embedding = embed_volume(network, cases.read(name), info, memory_mb, name)
        except (ValueError, RuntimeError, MemoryError) as error:  # torch's out of memory is a RuntimeError
            report["failed"][name] = str(error) or type(error).__name__
            continue
        save_embedding(embed_dir, dataclasses.replace(embedding, source=source[name]), storage)
        report["written"].append(name)
    return report
