"""The flags of commands that embed a few scans with SAM and then work on them."""

import argparse

from sam_embed.embeddings.embed import PRECISIONS


def add_embedding_flags(parser: argparse.ArgumentParser, memory_mb: float = 2048.0) -> None:
    """Add the group `run`: --memory_mb (with this default), --precision and --device."""
    run = parser.add_argument_group("run")
    run.add_argument("--memory_mb", type=float, default=memory_mb, help="working memory of the embedding, MB")
    run.add_argument("--precision", type=str, default="fp32", choices=list(PRECISIONS), help="bf16 suits GPUs")
    run.add_argument("--device", type=str, default="auto", choices=["auto", "cpu", "cuda"], help="where to embed")
