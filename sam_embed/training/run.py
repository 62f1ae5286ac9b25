"""What `scripts/train_sam.py` composes: averaged weights, the run's state, validation.

Yan et al., "SAM", TMI 2022, Sec. III-A. Training sees volumes only. Landmarks, where there are any, judge the held-out
cases and touch no weight.

Shapes: B volumes, C channels, (D, H, W) voxels.
"""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from datasets.ct.geometry import index_to_world
from datasets.ct.nifti import Volume
from sam_embed.checkpoint import CheckpointError, EmbedderInfo, embedder_checkpoint
from sam_embed.embeddings.embed import embed_volume
from sam_embed.embeddings.embedding_store import Embedding
from sam_embed.judging.baselines import find_body
from sam_embed.judging.evaluate import Landmarks, error_figures, evaluate_pairs, summarise
from sam_embed.matching.match import cycle_error_mm, match_points
from sam_embed.network import AnatomicalEmbedder, NetworkOptions

NUM_CYCLE_POINTS = 60


def embed_views(network: nn.Module, batch: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both views of a batch in one forward pass (so that batch norms see both).

    Returns:
        fine (view a, view b) and coarse (view a, view b), each float32 [B, C, d, h, w].
    """
    views = torch.cat([batch["view_a"], batch["view_b"]])  # [2B, 1, D, H, W]
    fine, coarse = network(views.contiguous(memory_format=torch.channels_last_3d))
    return tuple(fine.float().chunk(2)), tuple(coarse.float().chunk(2))


class WeightAverage:
    """Exponential average of a network's weights; it starts as a plain mean, so that short runs profit too.

    Args:
        network: averaged; its batch-norm statistics are copied as they are.
        momentum: share of the old average in the new one; 0 = the average is the network itself.
    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"--ema_momentum is {momentum}; expected from 0 (off) to below 1")
        self.momentum = momentum
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after `step` steps."""
        momentum = min(self.momentum, step / (step + 10))
        for mine, new in zip(self.network.parameters(), network.parameters()):
            mine.lerp_(new, 1 - momentum)
        for mine, new in zip(self.network.buffers(), network.buffers()):
            mine.copy_(new)


def share_done(step: int, num_steps: int, elapsed_s: float, limit_s: float) -> float:
    """How far a run is, 0 to 1: the larger of its steps' and its time's share (`limit_s` 0 = no limit).

    The learning rate follows this, so that a run on a slow machine ends with a low one too.
    """
    by_time = elapsed_s / limit_s if limit_s > 0 else 0.0
    return min(1.0, max(step / num_steps, by_time))


@dataclass
class SamRun:
    """Everything that changes while SAM trains.

    Attributes:
        network: not wrapped by DDP.
        average: its averaged weights; these are the checkpoint's `state_dict`.
        description: plain values added to the checkpoint (flags, commit, versions).
        step, elapsed_s: steps done, seconds trained, over all parts of a resumed run.
        best: lowest validation error so far, mm (None before the first validation).
        is_judged: False from the checkpoint before a validation until that has succeeded: a resumed run does it again.
    """

    network: AnatomicalEmbedder
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    info: EmbedderInfo
    description: dict = field(default_factory=dict)
    step: int = 0
    elapsed_s: float = 0.0
    best: float | None = None
    is_judged: bool = True

    def as_checkpoint(self) -> dict:
        """What `load_embedder` reads, and beside it what resuming needs."""
        return embedder_checkpoint(
            self.average.network,
            self.info,
            raw_state_dict=self.network.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            step=self.step,
            elapsed_s=self.elapsed_s,
            best=self.best,
            is_judged=self.is_judged,
            **self.description,
        )

    def restore(self, state: dict, path: str) -> None:
        """Go on where `state` was written.

        Raises:
            CheckpointError: it is of another network or optimiser, or has weights alone.
        """
        missing = [name for name in ("raw_state_dict", "optimizer", "step") if name not in state]
        if missing:
            raise CheckpointError(
                f"{path}: holds weights but no {', '.join(missing)} to resume from; use --resume none"
            )
        found = NetworkOptions(**state["options"]), state["preprocessing"]
        expected = self.network.options, self.info.preprocessing()
        if found != expected:
            raise CheckpointError(
                f"{path}: its network or preprocessing differs from the flags: {found} instead of {expected}; use the "
                "flags it was trained with, or --resume none with another --output_dir"
            )
        self.network.load_state_dict(state["raw_state_dict"])
        self.average.network.load_state_dict(state["state_dict"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(f"{path}: its optimiser does not fit --optimizer ({error})") from error
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.elapsed_s, self.best = state["step"], state["elapsed_s"], state["best"]
        self.is_judged = state.get("is_judged", True)  # older checkpoints were written after their validation


@dataclass(frozen=True)
class Validator:
    """Judges weights on held-out volumes: landmark error where landmarks are known, else the cycle error.

    Attributes:
        volumes: name -> volume, two or more; every ordered pair of them is matched.
        landmarks: of `sam_embed.judging.evaluate.load_landmarks`, or None.
        memory_mb: for embedding one volume.
    """

    volumes: dict[str, Volume]
    landmarks: dict[str, Landmarks] | None
    memory_mb: float = 4096

    def __call__(self, network: AnatomicalEmbedder, info: EmbedderInfo) -> dict[str, float]:
        """`error_median_mm`, `error_p90_mm`, `error_share_within_10mm` (or `cycle_*`) over all ordered pairs."""
        embeddings = {
            name: embed_volume(network, volume, info, self.memory_mb, name) for name, volume in self.volumes.items()
        }
        if self.landmarks is not None:
            kind = "error"
            figures = summarise(evaluate_pairs(embeddings.__getitem__, self.landmarks, show_progress=False))["sam"]
        else:
            kind, pairs = "cycle", itertools.permutations(embeddings.values(), 2)
            figures = error_figures(np.concatenate([self._cycle_errors(query, key) for query, key in pairs]))
        shown = ("median_mm", "p90_mm", "share_within_10mm")
        return {f"{kind}_{name}": figures.get(name, float("nan")) for name in shown}

    def _cycle_errors(self, query: Embedding, key: Embedding) -> np.ndarray:
        """Cycle errors in mm of random places in the query's body, the same ones in every validation."""
        body = find_body(self.volumes[query.name])
        places = np.argwhere(body.mask)
        chosen = np.random.default_rng(0).choice(len(places), min(NUM_CYCLE_POINTS, len(places)), replace=False)
        points = index_to_world(body.affine, places[chosen])
        errors = cycle_error_mm(query, key, points, match_points(query, key, points))
        return errors[np.isfinite(errors)]


def main_error(measured: Mapping[str, float]) -> float:
    """What decides which checkpoint is best: median plus a tenth of the 90th percentile, mm.

    The median alone ignores far outliers, and they are what mining suffers from.
    """
    kind = "error" if "error_median_mm" in measured else "cycle"
    return measured[f"{kind}_median_mm"] + 0.1 * measured[f"{kind}_p90_mm"]
