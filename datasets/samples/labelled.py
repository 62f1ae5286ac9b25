"""Crops with labels for finetuning: class-balanced, augmented, and a pure function of (seed, index).

MONAI's RandCropByPosNegLabel needs whole volumes in memory; here the store gives just the crop. A foreground crop
first draws an organ, all organs of the case alike, then a voxel of it, so that an adrenal gland is seen as often as the
liver. Flips are off: left and right kidney are different labels. A crop of depth 1 is a slice, for 2-D networks: it is
rotated and scaled in its plane only.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.ct.images import CT
from datasets.ct.intensity import CT_WINDOW_HU, fill_ends
from datasets.lists.label_classes import LabelClasses
from datasets.samples.augment import AugmentOptions, ViewAugmenter
from datasets.samples.random_contrast import ORGAN_HU, TO_OTHER_SCANNERS, change_intensity, change_organs
from datasets.store.volumes import VolumeStore

Size3 = tuple[int, int, int]
AFFINE_MARGIN = 1.3  # of a crop that is rotated and scaled: what turns into view was read, not made up
VOXELS_PER_CLASS = 2000  # kept per case and organ to centre crops on
INTENSITY = AugmentOptions(noise_std=0.05, window_prob=0.3, window_jitter_hu=20.0)


@dataclass(frozen=True)
class SegmentationAugment:
    """Strengths of the augmentation of a crop and its labels.

    Attributes:
        affine_prob: probability of rotation and scaling (0 = off).
        rotate_deg: largest rotation about each axis (of a slice: within its plane), degrees.
        scale: sizes change by up to this share.
        intensity: of the image alone.
        random_contrast: share of crops whose organs and tissues get random intensities, noise and sharpness before
            (`datasets.samples.random_contrast`; 0 = off). CT only.
    """

    affine_prob: float = 0.5
    rotate_deg: float = 12.0
    scale: float = 0.15
    intensity: AugmentOptions = field(default_factory=lambda: INTENSITY)
    random_contrast: float = 0.0

    @classmethod
    def off(cls) -> "SegmentationAugment":
        """No augmentation at all."""
        return cls(affine_prob=0.0, intensity=AugmentOptions.off())


class SegmentationCropDataset(Dataset):
    """Endless crops of labelled cases; sample i depends on (seed, i) alone.

    Args:
        store: must hold the labels of `case_names`.
        case_names: the cases to draw from.
        classes: label values and channels.
        roi: (D, H, W) of a crop in voxels of the store; D = 1 gives slices.
        hu_min, hu_max: the window that becomes [0, 1]; None = CT's default end, or that of `CaseRecord.value_range`.
        foreground_share: share of crops centred near an organ's voxel; the others lie anywhere in the body.
        augment: see `SegmentationAugment`.
        seed: decides everything.
        case_weights: how often each case is drawn, relative to the others, more than 0; None = all alike.

    Raises:
        ValueError: no cases, a case without label, or a share that is none.
    """

    def __init__(
        self,
        store: VolumeStore,
        case_names: Sequence[str],
        classes: LabelClasses,
        roi: Size3,
        hu_min: float | None = None,
        hu_max: float | None = None,
        foreground_share: float = 0.8,
        augment: SegmentationAugment | None = None,
        seed: int = 0,
        case_weights: Sequence[float] | None = None,
    ) -> None:
        unlabelled = [name for name in case_names if not store.record(name).has_label]
        if not case_names or unlabelled:
            raise ValueError(f"{store.store_dir}: no labels for {', '.join(unlabelled[:5]) or 'any case'}")
        if not 0 <= foreground_share <= 1:
            raise ValueError(f"--foreground_share {foreground_share}: expected a share between 0 and 1")
        self.store, self.case_names, self.classes = store, list(case_names), classes
        self.roi, self.foreground_share, self.seed = tuple(roi), foreground_share, seed
        self.augment = augment or SegmentationAugment()
        self._case_shares: np.ndarray | None = None
        if case_weights is not None and len(set(case_weights)) > 1:
            self._case_shares = np.asarray(case_weights) / np.sum(case_weights)
        self.window = hu_min, hu_max
        self._augment_view = ViewAugmenter(self.augment.intensity, *fill_ends(self.window, CT_WINDOW_HU))
        self._turn = affine_of(self.augment, self.roi)
        self._voxels: dict[str, dict[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.case_names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` (any number from 0 on).

        Returns:
            "image" float32 [C, D, H, W] in [0, 1]; "label" uint8 [1, D, H, W], channels; "case" int64, position in
            `case_names`.
        """
        rng = np.random.default_rng([self.seed, index])
        if self._case_shares is None:
            case = int(rng.integers(len(self.case_names)))
        else:
            case = int(rng.choice(len(self.case_names), p=self._case_shares))
        name = self.case_names[case]
        record = self.store.record(name)
        own_window = record.window(*self.window) if record.kind != CT else None
        centre = self._draw_centre(name, rng)
        if rng.random() < self.augment.affine_prob:
            hu, label = self._turned_crop(name, centre, int(rng.integers(2**31)))
        else:
            hu, label = self._crop(name, centre, self.roi)
        if self.augment.random_contrast > 0:
            hu = self._as_of_another_scanner(hu, label, record.spacing_mm, index)
        view_seed = np.random.SeedSequence([self.seed, index, 1])
        return {
            "image": self._augment_view(hu, view_seed, own_window),
            "label": torch.from_numpy(label)[None],
            "case": torch.tensor(case),
        }

    def count_voxels(self) -> np.ndarray:
        """Voxels of every channel, background included, over all cases [C]."""
        labels = (self.classes.to_classes(self.store.read_label(name).array) for name in self.case_names)
        return sum(np.bincount(label.ravel(), minlength=len(self.classes)) for label in labels)

    def class_voxels(self, name: str) -> dict[int, np.ndarray]:
        """Channel -> int32 [n, 3], up to `VOXELS_PER_CLASS` of its voxels (d, h, w), for the organs of a case."""
        if name not in self._voxels:
            label = self.classes.to_classes(self.store.read_label(name).array)
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
            occupied = np.flatnonzero(label)
            present = label.ravel()[occupied]
            self._voxels[name] = {}
            for channel in np.unique(present).tolist():
                own = occupied[present == channel]
                own = own if len(own) <= VOXELS_PER_CLASS else rng.choice(own, VOXELS_PER_CLASS, replace=False)
                self._voxels[name][channel] = np.stack(np.unravel_index(own, label.shape), axis=1).astype(np.int32)
        return self._voxels[name]

    def _draw_centre(self, name: str, rng: np.random.Generator) -> np.ndarray:
        """The middle voxel of a crop: up to a quarter of the crop beside an organ's voxel, or anywhere in the body."""
        voxels = self.class_voxels(name)
        if voxels and rng.random() < self.foreground_share:
            channel = sorted(voxels)[int(rng.integers(len(voxels)))]
            chosen = voxels[channel][int(rng.integers(len(voxels[channel])))]
            return chosen + np.rint(rng.uniform(-0.25, 0.25, 3) * self.roi).astype(int)
        record = self.store.record(name)
        return rng.integers(record.body_start, np.maximum(record.body_stop, np.asarray(record.body_start) + 1))

    def _crop(self, name: str, centre: np.ndarray, size: Size3) -> tuple[np.ndarray, np.ndarray]:
        """HU and channels around a voxel; moved inside where the volume is large enough for the crop itself."""
        shape, roi = np.array(self.store.record(name).shape), np.array(self.roi)
        start = np.asarray(centre) - roi // 2
        start = np.where(shape > roi, np.clip(start, 0, np.maximum(shape - roi, 0)), (shape - roi) // 2)
        start = start - (np.array(size) - roi) // 2
        label = self.classes.to_classes(self.store.label_crop(name, start, size))
        return self.store.crop(name, start, size), label

    def _as_of_another_scanner(
        self, hu: np.ndarray, label: np.ndarray, spacing_mm: Sequence[float], index: int
    ) -> np.ndarray:
        """A crop with random contrast, noise and sharpness, or as it is; drawn apart from all other draws."""
        rng = torch.Generator().manual_seed(int(np.random.SeedSequence([self.seed, index, 2]).generate_state(1)[0]))
        if float(torch.rand((), generator=rng)) >= self.augment.random_contrast:
            return hu
        changed = change_organs(torch.from_numpy(hu).float(), torch.from_numpy(label), ORGAN_HU, rng)
        return change_intensity(changed, spacing_mm, TO_OTHER_SCANNERS, rng).numpy()

    def _turned_crop(self, name: str, centre: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A rotated and scaled crop, cut from a larger one; a slice stays in its plane."""
        is_slice = self.roi[0] == 1
        size = tuple(int(np.ceil(side * AFFINE_MARGIN)) if side > 1 else 1 for side in self.roi)
        hu, label = self._crop(name, centre, size)
        self._turn.set_random_state(seed=seed)
        # MONAI wants channels in front; a slice has no depth then.
        spatial, lead = (size[1:] if is_slice else size), hu.shape[:-3]
        pair = {"image": torch.from_numpy(hu).float(), "label": torch.from_numpy(label).float()}
        turned = self._turn({key: value.reshape(-1, *spatial) for key, value in pair.items()})
        image, label = (turned[key].as_subclass(torch.Tensor) for key in ("image", "label"))
        return image.reshape(*lead, *self.roi).numpy(), label.reshape(self.roi).numpy().astype(np.uint8)


def affine_of(augment: SegmentationAugment, roi: Size3):
    """MONAI's random rotation and scaling of a crop and its label, which cuts `roi` out; a slice stays in its plane."""
    from monai.transforms import RandAffined  # here: MONAI takes seconds, which `--help` need not wait for

    is_slice = roi[0] == 1
    return RandAffined(
        keys=("image", "label"),
        spatial_size=roi[1:] if is_slice else roi,
        prob=1.0,
        rotate_range=[np.deg2rad(augment.rotate_deg)] * (1 if is_slice else 3),
        scale_range=[augment.scale] * (2 if is_slice else 3),
        mode=("bilinear", "nearest"),
        padding_mode="border",
    )
