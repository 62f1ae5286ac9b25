"""A frozen encoder opened for use: volumes in, feature maps with their place in the world out.

from engine.features import load_features
extract = load_features("alice_teacher.safetensors")
features = extract("ct.nii.gz")
features.maps[32], features.affines[32]    # [C, d, h, w], and cell index -> world mm
features.pooled()                          # [C]
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from datasets.ct.geometry import CANONICAL_AXCODES, spacing_of
from datasets.ct.images import CT, MR
from datasets.ct.intensity import MR_RANGE
from datasets.ct.nifti import HU_MAX, HU_MIN, Volume
from engine.device import pick_device, pick_precision
from engine.features.dense import dense_maps
from engine.features.orientation import check_axcodes, in_axis_order
from engine.segmentation.setup import Preprocessing, given_by, resolve_setup
from engine.segmentation.sliding_window import WindowOptions
from engine.weights import read_encoder
from models.backbones import BACKBONES
from models.backbones.interface import Backbone, pool_tokens
from models.pretrained import LoadReport, load_pretrained
from sam_embed.checkpoint import weights_fingerprint


@dataclass(frozen=True)
class EncoderOptions:
    """The encoder, and how its input is prepared.

    Attributes:
        weights: extracted weights, a checkpoint of pretraining or finetuning, published weights, or hf://owner/name
        checkpoint_key: which network of a file that holds two; auto = the teacher of our checkpoints where there is one
        min_share: least share of the encoder's keys that must fit, 0 to 1
        backbone: network; unset = the weights', else swin_unetr
        feature_size: channels at stride 2; unset = the weights', else 48
        spacing_mm: voxel size in mm: D H W, one number, or native; unset = the weights', else 2 1.5 1.5
        a_min: HU that becomes 0; unset = the weights', else -125
        a_max: HU that becomes 1; unset = the weights', else 225
        roi_x: window along W, voxels; unset = the weights', else 96
        roi_y: window along H, voxels; unset = the weights', else 96
        roi_z: window along D, voxels; unset = the weights', else 96
        axcodes: axis order of the arrays that the weights know; published ones mostly RAS. Results stay in ours
    """

    weights: str
    checkpoint_key: Literal["auto", "student", "teacher"] = "auto"
    min_share: float = 0.9
    backbone: str | None = field(default=None, metadata={"choices": sorted(BACKBONES)})
    feature_size: int | None = None
    spacing_mm: tuple[float | str, ...] | None = None
    a_min: float | None = None
    a_max: float | None = None
    roi_x: int | None = None
    roi_y: int | None = None
    roi_z: int | None = None
    axcodes: str = CANONICAL_AXCODES

    def __post_init__(self) -> None:
        check_axcodes(self.axcodes)


@dataclass(frozen=True)
class Features:
    """Maps of one volume, by stride in voxels.

    Attributes:
        maps: {stride: float32 [C, d, h, w] on the CPU}, rising strides.
        affines: {stride: float64 [4, 4]}, index (d, h, w) of a cell -> its centre, world RAS+ mm.
    """

    maps: dict[int, Tensor]
    affines: dict[int, np.ndarray]

    def pooled(self) -> Tensor:
        """The means over the cells of every map, joined in order of rising strides: float32 [sum of C]."""
        return pool_tokens({stride: one[None] for stride, one in self.maps.items()}, tuple(self.maps))[0]

    def geometry(self) -> dict[str, dict]:
        """{stride as text: channels, shape and spacing_mm (d h w) and affine of its map}, in plain values."""
        return {
            str(stride): {
                "channels": one.shape[0],
                "shape": list(one.shape[1:]),
                "spacing_mm": [float(value) for value in spacing_of(self.affines[stride])],
                "affine": self.affines[stride].tolist(),
            }
            for stride, one in self.maps.items()
        }


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen encoder and how it is slid over volumes. Call it with a file, a volume or a tensor.

    Attributes:
        backbone: in evaluation mode; `backbone.encode(windows)` maps windows [B, 1, *roi] in [0, 1] to {stride: map}.
        preprocessing: of its input.
        windows: how it is slid.
        device: where it is.
        report: which of its weights came from the file.
        notes: warnings of `resolve_setup`.
        axcodes: axis order of the windows that the backbone knows; volumes and maps are in ours.
    """

    backbone: Backbone
    preprocessing: Preprocessing
    windows: WindowOptions
    device: torch.device
    report: LoadReport
    notes: list[str]
    axcodes: str = CANONICAL_AXCODES

    @property
    def strides(self) -> list[int]:
        """The maps that there are, by stride in voxels, rising."""
        return sorted(self.backbone.channels)

    def __call__(self, volume: str | Path | Volume | Tensor, strides: Sequence[int] = ()) -> Features:
        """Features of a whole volume of any size.

        Args:
            volume: a file; what was read from one; or HU (mapped MR) [1, 1, D, H, W] in the order "SPL" on the
                network's own grid, whose first voxel is then the origin.
            strides: the maps to make; empty = all of them.

        Raises:
            ValueError: an encoder without a map at one of the strides, an unreadable file, or a tensor of other axes.
        """
        self.check_strides(strides)
        if isinstance(volume, Tensor):
            volume = self._as_volume(volume)
        elif not isinstance(volume, Volume):
            volume = self.preprocessing.read(volume)
        if volume.num_channels > 1:
            raise ValueError(f"{volume.path}: holds {volume.num_channels} channels; features are of one")
        volume = self.preprocessing.on_own_grid(volume)
        found = dense_maps(
            in_axis_order(self.backbone.encode, self.axcodes),
            torch.from_numpy(np.ascontiguousarray(volume.array)),
            sorted(strides) or self.strides,
            self.strides[-1],
            self.preprocessing.windows_for(volume, self.windows),
            self.device,
        )
        maps = {stride: values for stride, (values, _) in found.items()}
        return Features(maps, {stride: volume.affine @ to_voxels for stride, (_, to_voxels) in found.items()})

    def check_strides(self, strides: Sequence[int]) -> None:
        """Raise ValueError where the encoder has no map at one of the strides."""
        if unknown := sorted(set(strides) - set(self.strides)):
            raise ValueError(f"--maps {' '.join(map(str, unknown))}: the encoder has maps at strides {self.strides}")

    def _as_volume(self, hu: Tensor) -> Volume:
        if hu.ndim != 5 or hu.shape[:2] != (1, 1):
            raise ValueError(f"a volume of shape {list(hu.shape)}: expected HU [1, 1, D, H, W]")
        ends = MR_RANGE if self.preprocessing.images == MR else (HU_MIN, HU_MAX)
        array = hu[0, 0].detach().cpu().round().clamp(*ends).to(torch.int16).numpy()
        spacing = self.preprocessing.spacing_mm or (1.0, 1.0, 1.0)
        affine = np.zeros((4, 4))
        # Index (d, h, w) grows to superior, posterior, left; world x grows to the right, y to anterior.
        affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = spacing[0], -spacing[1], -spacing[2], 1.0
        return Volume(array, affine, "tensor")

    def fingerprint(self) -> str:
        """A text that changes with any weight."""
        return weights_fingerprint(self.backbone.network.state_dict())


def load_features(
    weights: str | Path,
    device: str = "auto",
    precision: str = "auto",
    overlap: float = 0.5,
    window_batch: int = 1,
    **options,
) -> FeatureExtractor:
    """A frozen encoder, ready for use, with the spacing, HU window and window size that its weights ask for.

    Args:
        weights: as `EncoderOptions.weights`.
        device, precision: see `engine.device.pick_device` and `pick_precision`.
        overlap, window_batch: see `WindowOptions`.
        options: further fields of `EncoderOptions`, for weights that do not describe themselves.

    Raises:
        ValueError: weights that cannot be read or do not fit, or sizes that the network cannot take.
    """
    place = pick_device(device, 0)
    extractor = open_extractor(EncoderOptions(str(weights), **options), place, precision, overlap, window_batch)
    for note in extractor.notes:
        warnings.warn(note, stacklevel=2)
    return extractor


def open_extractor(
    options: EncoderOptions, device: torch.device, precision: str, overlap: float, window_batch: int
) -> FeatureExtractor:
    """`load_features` on a given device; its notes are left to the caller."""
    file = read_encoder(options.weights, options.checkpoint_key)
    described = file.description.get("preprocessing", {})
    images, percentiles = described.get("images", CT), described.get("mr_percentiles")
    setup = resolve_setup(
        file.description, given_by(options), BACKBONES, images=images, mr_percentiles=percentiles and tuple(percentiles)
    )
    known = setup.preprocessing
    if known.spatial_dims == 2 and options.axcodes != CANONICAL_AXCODES:
        raise ValueError(f"--axcodes {options.axcodes}: slices (--roi_z 1) are axial in our order; leave the flag away")
    backbone = BACKBONES[setup.backbone](setup.feature_size, known.roi, None, False, with_masks=False)
    report = load_pretrained(backbone.network, file, options.min_share)
    windows = WindowOptions(
        known.roi, overlap=overlap, window_batch=window_batch, precision=pick_precision(precision, device)
    )
    backbone.to(device).eval().requires_grad_(False)
    return FeatureExtractor(backbone, known, windows, device, report, setup.notes, options.axcodes)
