"""Frozen probes: how well a network's unchanged features separate organs, voxel by voxel.

Two readers of the same features. The k-NN probe asks the most similar voxels of other patients, each with the weight
exp(cosine / temperature) (Caron et al., DINO, 2021; Wu et al., 2018). The linear probe is multinomial logistic
regression. Neither changes the network, and both take seconds, so that pretraining can be watched with them.

A voxel's feature is that of a window around it, read from the encoder's map of every stride by trilinear interpolation
and joined. Features are standardised with the mean and spread of the teaching voxels.

Letters: n voxels, C joined channels, K classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.device import autocast
from engine.distributed import World, wait_for_all
from engine.flags import FlagChecks
from engine.loop import evaluating
from engine.segmentation.sliding_window import WindowOptions, cut_windows, pad_to, window_starts

Encode = Callable[[Tensor], dict[int, Tensor]]
CHUNK = 1024  # judged voxels compared with all teaching voxels at a time


@dataclass(frozen=True)
class ProbeOptions(WindowOptions):
    """How features are read and probed; each voxel is read from the window that it is most central in.

    Attributes:
        strides: encoder maps to join, by stride in voxels; empty = all of them (but not the voxels themselves)
        num_neighbours: of the k-NN probe
        temperature: of the k-NN probe's votes
        weight_decay: of the linear probe: half of it times the squared weights is added to its mean loss; 0 = off
    """

    strides: tuple[int, ...] = ()
    num_neighbours: int = 20
    temperature: float = 0.07
    weight_decay: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = FlagChecks(self)
        checks.expect(self.num_neighbours >= 1, "num_neighbours", "1 or more")
        checks.expect(self.temperature > 0, "temperature", "more than 0")
        checks.expect(self.weight_decay >= 0, "weight_decay", "0 (off) or more")
        checks.finish()


# Features


@torch.no_grad()
def voxel_features(
    encode: Encode, hu: np.ndarray, voxels: np.ndarray, options: ProbeOptions, device: torch.device
) -> dict[int, Tensor]:
    """Features of single voxels of one volume.

    Args:
        encode: windows [B, 1, *roi] in [0, 1] -> {stride: map [B, C_stride, D/stride, H/stride, W/stride]}; in
            evaluation mode.
        hu: int16 [D, H, W]; one smaller than a window gets air around it.
        voxels: [n, 3] indices (d, h, w).

    Returns:
        {stride: float32 [n, C_stride]} on the CPU, in the order of rising strides.

    Raises:
        ValueError: the encoder has no map at a stride that is asked for.
    """
    padded, before = pad_to(torch.from_numpy(np.ascontiguousarray(hu)), options.roi, options.outside)
    places = torch.from_numpy(np.asarray(voxels)) + torch.tensor(before)
    corners = central_corners(places, padded.shape, options)
    used, window_of = torch.unique(corners, dim=0, return_inverse=True)
    found: dict[int, Tensor] = {}
    for first in range(0, len(used), options.window_batch):
        batch = used[first : first + options.window_batch]
        with autocast(options.precision, device):
            maps = encode(cut_windows(padded, batch.tolist(), options, device))
        for stride in wanted_strides(maps, options.strides):
            for index, (corner, feature_map) in enumerate(zip(batch, maps[stride])):
                rows = (window_of == first + index).nonzero().flatten()
                read = interpolate(feature_map, places[rows] - corner, options.roi)  # [rows, C]
                found.setdefault(stride, torch.empty(len(places), read.shape[1]))[rows] = read
    return found


def central_corners(places: Tensor, shape: Sequence[int], options: ProbeOptions) -> Tensor:
    """For every place [n, 3] the corner [n, 3] of the window, of those that cover the volume, whose middle is nearest.

    Windows form a grid, so that the nearest one is found axis by axis.
    """
    columns = []
    for axis, (size, side) in enumerate(zip(shape, options.roi)):
        starts = torch.tensor(window_starts(size, side, options.overlap))
        distance = (places[:, axis, None] - (starts + (side - 1) / 2)).abs()  # [n, windows]
        columns.append(starts[distance.argmin(1)])
    return torch.stack(columns, dim=1)


def wanted_strides(maps: dict[int, Tensor], strides: tuple[int, ...]) -> list[int]:
    """The strides to join, rising.

    Raises:
        ValueError: the encoder lacks one of them.
    """
    known = sorted(stride for stride in maps if stride > 1)
    unknown = [stride for stride in strides if stride not in known]
    if unknown:
        raise ValueError(f"--strides {' '.join(map(str, unknown))}: the encoder has maps at {known}")
    return sorted(strides) or known


def interpolate(feature_map: Tensor, places: Tensor, roi: tuple[int, int, int]) -> Tensor:
    """Values of a map [C, d, h, w] of a window at voxels [n, 3] of it, trilinear: float32 [n, C] on the CPU.

    A map's cell lies in the middle of its voxels; beyond the outermost cells their values hold.
    """
    relative = (2 * places + 1) / torch.tensor(roi) - 1  # -1 to 1 between the outer faces of the window
    grid = relative.flip(1).to(feature_map.device, torch.float32)  # grid_sample wants W, H, D
    read = torch.nn.functional.grid_sample(
        feature_map.float()[None], grid.view(1, -1, 1, 1, 3), padding_mode="border", align_corners=False
    )  # [1, C, n, 1, 1]
    return read.reshape(feature_map.shape[0], -1).T.cpu()


def collect(
    encode: Encode, cases: Sequence, voxels, options: ProbeOptions, device: torch.device, progress: str
) -> tuple[dict[int, Tensor], Tensor]:
    """Features {stride: [n, C_stride]} and classes int64 [n] of the chosen voxels of several cases, joined."""
    read = [
        voxel_features(encode, voxels.read_hu(case.name), case.voxels, options, device)
        for case in tqdm(cases, desc=progress, unit="case", disable=not progress)
    ]
    features = {stride: torch.cat([one[stride] for one in read]) for stride in read[0]}
    return features, torch.cat([torch.from_numpy(np.asarray(case.channels)) for case in cases])


def standardise(taught: dict[int, Tensor], judged: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Join the strides: every channel with mean 0 and spread 1 over the teaching voxels, over the root of its stride's
    number of channels, so that every stride has the same weight in a cosine."""
    joined = ([], [])
    for stride, values in taught.items():
        mean, spread = values.mean(0), values.std(0, unbiased=False).clamp(min=1e-6)
        for parts, side in zip(joined, (taught, judged)):
            parts.append((side[stride] - mean) / spread / math.sqrt(values.shape[1]))
    return torch.cat(joined[0], dim=1), torch.cat(joined[1], dim=1)


# Probes: teaching features [n, C] and classes [n], judged features [m, C] -> predicted classes [m]


def knn_predict(
    taught: Tensor, classes: Tensor, judged: Tensor, num_classes: int, num_neighbours: int, temperature: float
) -> Tensor:
    """The class with most votes of the nearest teaching voxels by cosine, each weighing exp(cosine / temperature)."""
    taught, judged = (torch.nn.functional.normalize(side, dim=1) for side in (taught, judged))
    one_hot = torch.nn.functional.one_hot(classes, num_classes).float()  # [n, K]
    predicted = []
    for chunk in judged.split(CHUNK):
        cosine, nearest = (chunk @ taught.T).topk(min(num_neighbours, len(taught)), dim=1)  # [chunk, k]
        weights = ((cosine - 1) / temperature).exp()
        predicted.append((weights[..., None] * one_hot[nearest]).sum(1).argmax(1))
    return torch.cat(predicted)


def linear_predict(taught: Tensor, classes: Tensor, judged: Tensor, num_classes: int, weight_decay: float) -> Tensor:
    """The most probable class of multinomial logistic regression; every class has the same weight in its fit."""
    weight, bias = fit_logistic(taught, classes, num_classes, weight_decay)
    return (judged @ weight.T + bias).argmax(1)


def fit_logistic(
    features: Tensor, classes: Tensor, num_classes: int, weight_decay: float, max_iterations: int = 200
) -> tuple[Tensor, Tensor]:
    """Weights [K, C] and biases [K] of multinomial logistic regression, by L-BFGS from zero: no random numbers.

    The loss is the mean over classes of each class's mean cross entropy, plus weight_decay / 2 times the squared
    weights.
    """
    counts = torch.bincount(classes, minlength=num_classes)
    share = counts.clamp(min=1).float().reciprocal()[classes] / (counts > 0).sum()  # [n], sums to 1
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = torch.nn.functional.cross_entropy(features @ weight.T + bias, classes, reduction="none")
        total = (entropy * share).sum() + 0.5 * weight_decay * weight.square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def score(predicted: Tensor, classes: Tensor, names: Sequence[str]) -> dict:
    """Compare predicted and true classes [m]; classes that no judged voxel has do not count.

    Returns:
        "accuracy" over all voxels, "recall" by class, "balanced_accuracy" (the mean recall); all 0 to 1.
    """
    is_right = predicted == classes
    recall = {
        name: float(is_right[classes == channel].float().mean())
        for channel, name in enumerate(names)
        if (classes == channel).any()
    }
    balanced = sum(recall.values()) / len(recall)
    return {"accuracy": float(is_right.float().mean()), "balanced_accuracy": balanced, "recall": recall}


def probe_encoder(
    encode: Encode, voxels, options: ProbeOptions, device: torch.device, progress: str = ""
) -> dict[str, dict]:
    """Both probes on one frozen encoder.

    Args:
        encode: see `voxel_features`.
        voxels: `datasets.samples.probe_voxels.ProbeVoxels`.
        progress: name of the progress bar; empty = none.

    Returns:
        {"knn": scores, "linear": scores}, see `score`.
    """
    names = voxels.classes.names
    taught, classes = collect(encode, voxels.taught, voxels, options, device, progress)
    judged, truth = collect(encode, voxels.judged, voxels, options, device, progress)
    taught, judged = standardise(taught, judged)
    knn = knn_predict(taught, classes, judged, len(names), options.num_neighbours, options.temperature)
    linear = linear_predict(taught, classes, judged, len(names), options.weight_decay)
    return {"knn": score(knn, truth, names), "linear": score(linear, truth, names)}


def watch_probe(method: nn.Module, voxels, options: ProbeOptions, world: World) -> dict[str, float]:
    """The numbers that pretraining is watched with; leaves no trace in modules or random states.

    Args:
        method: not wrapped by DDP; its student has a `backbone` that encodes, and its teacher may have one.
        voxels: see `probe_encoder`; rank 0 alone needs them.

    Returns:
        On rank 0 `probe_knn_balanced` and `probe_linear_balanced` of the student, and both with `_teacher` at the end;
        nothing on the others, which wait as long as it takes.
    """
    values = {}
    if world.is_main:
        with evaluating(method):
            for name, network in method.networks().items():
                if not hasattr(network, "backbone"):
                    continue
                ending = "" if name == "student" else f"_{name}"
                found = probe_encoder(network.backbone.encode, voxels, options, world.device)
                values |= {f"probe_{probe}_balanced{ending}": one["balanced_accuracy"] for probe, one in found.items()}
    wait_for_all(world)
    return values
