"""Frozen features as a segmenter: a small MLP reads each voxel's features by itself and names its organ.

A few labelled cases teach it in seconds; the network's weights do not change. Its Dice over whole volumes of other
cases says how much of a segmentation the features hold already. The accuracy at chosen voxels does not say that: there,
organs and background are equally frequent.

A voxel's feature is that of `engine.features.dense`: the encoder's maps at strides of 2 and more, interpolated at the
voxel (trilinear) and joined.

Letters: n voxels, C joined channels, K classes, background first.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.features.dense import dense_maps
from engine.segmentation.metrics import case_means, nan_mean, score_case
from engine.segmentation.sliding_window import Size3, restored_slices
from engine.watch.probe import ProbeOptions, interpolate, wanted_strides
from models.backbones.interface import Backbone

TAUGHT_VOXELS = 20_000  # of each case
HIDDEN_DIM = 128
STEPS, BATCH = 300, 2048
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-2
CHUNK = 32_768  # voxels that the MLP reads at a time
LEAST_SPREAD = 1e-6


@dataclass(frozen=True)
class JoinedMaps:
    """Feature maps of one volume: values [C_s, d, h, w] and the matrix [4, 4] from cell to voxel index, by stride."""

    maps: dict[int, tuple[Tensor, np.ndarray]]

    def at(self, voxels: Tensor) -> Tensor:
        """Joined features of voxels [n, 3] (d, h, w): float32 [n, C]."""
        read = []
        for values, (scale, offset) in self._grids():
            cells = voxels * torch.from_numpy(scale) + torch.from_numpy(offset)
            read.append(interpolate(values, cells, tuple(values.shape[1:])))
        return torch.cat(read, dim=1)

    def slices(self, shape: Size3) -> Iterator[Tensor]:
        """The same of all voxels of a volume (D, H, W), slice by slice: [C, H, W] each."""
        read = [restored_slices(iter(v.unbind(1)), v.shape[1:], grid, shape) for v, grid in self._grids()]
        return (torch.cat(parts) for parts in zip(*read))

    def _grids(self) -> Iterator[tuple[Tensor, tuple[np.ndarray, np.ndarray]]]:
        """Every map, with scale and offset [3] from voxel to cell index."""
        for values, to_voxels in self.maps.values():
            steps = np.diagonal(to_voxels)[:3]
            yield values, (1 / steps, -to_voxels[:3, 3] / steps)


ReadMaps = Callable[[np.ndarray], JoinedMaps]  # HU int16 [D, H, W] -> the frozen encoder's maps


def maps_reader(backbone: Backbone, options: ProbeOptions, device: torch.device) -> ReadMaps:
    """The function that reads the maps of whole volumes from an encoder in evaluation mode.

    Raises:
        ValueError: the encoder has no map at one of `options.strides`.
    """
    strides, deepest = wanted_strides(backbone.channels, options.strides), max(backbone.channels)

    def read(hu: np.ndarray) -> JoinedMaps:
        tensor = torch.from_numpy(np.ascontiguousarray(hu))
        return JoinedMaps(dense_maps(backbone.encode, tensor, strides, deepest, options, device))

    return read


@dataclass(frozen=True)
class TaughtVoxels:
    """Voxels that teach: `features` [n, C], `classes` int64 [n], and `weights` [n], how often each is drawn."""

    features: Tensor
    classes: Tensor
    weights: Tensor

    @classmethod
    def joined(cls, parts: Sequence["TaughtVoxels"]) -> "TaughtVoxels":
        """Those of several cases."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("features", "classes", "weights")))


def draw_taught(
    maps: JoinedMaps, channels: np.ndarray, rng: np.random.Generator, allowed: np.ndarray | None = None
) -> TaughtVoxels:
    """Draw voxels of one case. Each class is drawn in proportion to the root of its number of voxels.

    With their true shares small organs would hardly count, with equal shares they would be drawn far too large
    (`losses.segmentation.rare_class_weights` takes the root too).

    Args:
        channels: [D, H, W], the class of every voxel.
        allowed: bool [D, H, W], voxels that may teach; None = all.
    """
    candidates = np.arange(channels.size) if allowed is None else np.flatnonzero(allowed)
    present = channels.ravel()[candidates]
    share = np.sqrt(np.bincount(present))
    share /= share.sum()
    chosen, weights = [], []
    for channel in np.flatnonzero(share):
        own = candidates[present == channel]
        number = min(len(own), int(np.ceil(TAUGHT_VOXELS * share[channel])))
        chosen.append(rng.choice(own, number, replace=False))
        weights.append(np.full(number, share[channel] / number))
    flat = np.concatenate(chosen)
    voxels = torch.from_numpy(np.stack(np.unravel_index(flat, channels.shape), axis=1))
    classes = torch.from_numpy(channels.ravel()[flat].astype(np.int64))
    return TaughtVoxels(maps.at(voxels), classes, torch.from_numpy(np.concatenate(weights)))


class VoxelMLP(nn.Module):
    """Features [n, C] -> logits [n, K]: channels are standardised, then linear, GELU, linear."""

    def __init__(self, features: Tensor, num_classes: int) -> None:
        """Standardise with mean and spread of `features`."""
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("spread", features.std(0, unbiased=False).clamp(min=LEAST_SPREAD))
        self.layers = nn.Sequential(
            nn.Linear(features.shape[1], HIDDEN_DIM), nn.GELU(), nn.Linear(HIDDEN_DIM, num_classes)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers((features - self.mean) / self.spread)


def fit_mlp(taught: TaughtVoxels, num_classes: int, seed: int = 0) -> VoxelMLP:
    """Teach by AdamW with a rate that falls to zero along a cosine; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        mlp = VoxelMLP(taught.features, num_classes)
        optimizer = torch.optim.AdamW(mlp.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.multinomial(taught.weights, BATCH, replacement=True)
            optimizer.zero_grad()
            nn.functional.cross_entropy(mlp(taught.features[rows]), taught.classes[rows]).backward()
            optimizer.step()
            schedule.step()
    return mlp.eval()


@torch.no_grad()
def segment_by_mlp(mlp: VoxelMLP, maps: JoinedMaps, shape: Sequence[int]) -> np.ndarray:
    """The most probable class of every voxel, uint8 [D, H, W]."""
    found = np.empty(tuple(shape), dtype=np.uint8)
    for plane, features in zip(found, maps.slices(tuple(shape))):
        pixels = features.flatten(1).T.split(CHUNK)
        plane[:] = torch.cat([mlp(part).argmax(1) for part in pixels]).view(plane.shape).numpy()
    return found


def probe_mlp(read_maps: ReadMaps, voxels, seed: int = 0, progress: str = "") -> dict[str, float | dict[str, float]]:
    """Teach an MLP with the teaching cases, and judge it on the whole volumes of the others.

    Args:
        read_maps: of `maps_reader`.
        voxels: `datasets.samples.probe_voxels.ProbeVoxels`; its cases, store and classes are used.
        seed: of the voxels that teach and of the MLP.
        progress: name of the progress bar; empty = none.

    Returns:
        "dice": mean over cases of the mean over organs; "organs" and "cases": Dice of each, in [0, 1] or NaN. Voxels
        are those of the store.
    """
    names, rng = voxels.classes.names, np.random.default_rng(seed)
    parts = [
        draw_taught(read_maps(voxels.read_hu(case.name)), voxels.read_channels(case.name), rng)
        for case in voxels.taught
    ]
    mlp = fit_mlp(TaughtVoxels.joined(parts), len(names), seed)
    scores = []
    for case in tqdm(voxels.judged, desc=progress, unit="case", disable=not progress):
        volume, truth = voxels.store.read(case.name), voxels.read_channels(case.name)
        predicted = segment_by_mlp(mlp, read_maps(volume.array), truth.shape)
        scores += score_case(case.name, predicted, truth, volume.spacing_mm, names, tolerance_mm=0.0)
    by_case = case_means(scores)
    by_organ = {name: nan_mean([score.dice for score in scores if score.organ == name]) for name in names[1:]}
    return {"dice": nan_mean(list(by_case.values())), "organs": by_organ, "cases": by_case}
