"""The crop dataset: sample i is V crops and their views, a pure function of (seed, i).

A sample is made in two steps. `CropDataset.cut` reads crops and draws what their views will be: that is for loading
processes (`CutSamples`). `CropDataset.make_views` makes the views of a batch on the training device. Asked for sample
i itself, the dataset does both.

A pairing rule (`pairings.py`) chooses the places of the V crops. A method names the views that it needs of every crop:
"augmented" (the crop with intensity augmentation), "moved" (zoomed, mirrored and turned before that), "blocks" (a block
mask), "distorted" (augmented and corrupted, with a clean target). Every random choice of sample i comes from NumPy's
`SeedSequence([seed, i, attempt])`, so that ranks, workers, restarts and the order of reading change nothing.
Cases are dealt like cards: each run of `num_cases` samples visits every case once, in an order of its own.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from datasets.ct.images import CT, RADIOGRAPH
from datasets.ct.intensity import CT_WINDOW_HU, fill_ends
from datasets.samples.anatomy import AnatomyPoints
from datasets.samples.augment import AugmentOptions
from datasets.samples.crops import CropOptions, cut, start_at
from datasets.samples.distort import DistortOptions
from datasets.samples.masks import MaskOptions, draw_mask, mask_grid, num_masked_blocks
from datasets.samples.pairings import Pairing, Places
from datasets.samples.views import PICTURED_KINDS, ViewMaker
from datasets.store.format import StoreError

VIEW_KINDS = (*PICTURED_KINDS, "blocks")
MAX_ATTEMPTS = 20  # broken volumes in a row for one sample; more than that is no accident
PAIRED_ATTEMPTS = 10  # after these, a sample of one volume: with few cases every pair may contain the broken one

logger = logging.getLogger(__name__)


class BrokenVolumeError(ValueError):
    """A crop that could not be read; the dataset reports its volume once and draws another sample."""


class CropDataset(Dataset):
    """Samples of V crops of a volume store.

    Args:
        store: a `VolumeStore` (or anything with `names`, `kind`, `record` and `crop`).
        pairing: the rule, made for the cases to draw from.
        views: name -> what is made of every crop, one of `VIEW_KINDS`.
        crops: window and augmentation; the crop's size is the rule's. Without a window of its own a radiograph
            or an MR is shown in its whole range.
        masks: for views of blocks.
        augment: strengths for augmented views; None = the defaults, or none at all where `crops.augment` is off.
        seed: every choice depends on it, 0 or more.
        distort: for distorted views.
        anatomy: draws points of every crop and reads SAM's vectors there; None = the method needs none.
    """

    def __init__(
        self,
        store,
        pairing: Pairing,
        views: Mapping[str, str],
        crops: CropOptions | None = None,
        masks: MaskOptions | None = None,
        augment: AugmentOptions | None = None,
        seed: int = 0,
        distort: DistortOptions | None = None,
        anatomy: AnatomyPoints | None = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"--seed is {seed}, expected 0 or more")
        if unknown := set(views.values()) - set(VIEW_KINDS):
            raise ValueError(f"views of kind {', '.join(sorted(unknown))}; expected {', '.join(VIEW_KINDS)}")
        self.store, self.pairing, self.views, self.seed = store, pairing, dict(views), seed
        self.names = check_names(store, pairing.names)
        check_depth(store, pairing.roi)
        self.crops = crops or CropOptions()
        self.anatomy = anatomy
        if augment is None:
            augment = AugmentOptions() if self.crops.augment else AugmentOptions.off()
        self.hu_window = fill_ends((self.crops.a_min, self.crops.a_max), CT_WINDOW_HU)
        self.view_maker = ViewMaker(self.views, pairing.roi, self.hu_window, augment, distort)
        for name in self.names:
            self._own_window(name)  # flags that fit a volume's range badly are refused now, not in the run's middle
        if "blocks" in views.values():
            masks = masks or MaskOptions()
            self.grid = mask_grid(pairing.roi, masks.mask_block)
            self.num_masked = num_masked_blocks(self.grid, masks.mask_ratio)
        self._store_index = {name: index for index, name in enumerate(store.names)}
        # Shared with the loader's workers, so that a broken volume is reported once and counted in the main process.
        self._is_broken = torch.zeros(len(store.names), dtype=torch.bool).share_memory_()
        self._deal: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        """Samples of one epoch: each case comes first once. Indices beyond it are valid and go on without an end."""
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` (0 or more, no upper end).

        Returns:
            "crop": float32 [V, 1, D, H, W] in [0, 1], windowed and not augmented (reconstruction targets);
            one entry for each name in `views`: augmented, moved or distorted crops like "crop" (of a distorted view
            also `<name>_target`: the clean crop, mirrored where the view is), or bool masks [V, d, h, w] on the block
            grid (roi / mask_block), True = masked = in the loss;
            "case": int64 [V] index into `store.names`; "centre_mm": float32 [V, 3], crop centres in world mm;
            "score": float32; "is_fallback": bool; the rule's further facts ("overlap" of the grids); with `anatomy`
            the entries of `AnatomyPoints.sample`.

        Raises:
            BrokenVolumeError: `MAX_ATTEMPTS` samples in a row met unreadable volumes.
        """
        sample = self.make_views(default_collate([self.cut(index)]))
        return {name: value[0] for name, value in sample.items()}

    def cut(self, index: int) -> dict:
        """Sample `index` before its views are made: int16 crops "hu" [V, D, H, W], "draws" of its views, and all else.

        Raises:
            BrokenVolumeError: as `__getitem__`.
        """
        for attempt in range(MAX_ATTEMPTS):
            seeds = np.random.SeedSequence([self.seed, int(index), attempt])
            places = self._draw(int(index), attempt, seeds.spawn(1)[0])
            try:
                crops_hu = [self._cut(name, point) for name, point in zip(places.names, places.points_mm)]
            except BrokenVolumeError as error:
                last_error = error
                continue
            return self._cut_sample(places, crops_hu, seeds)
        raise BrokenVolumeError(
            f"sample {index}: {MAX_ATTEMPTS} samples in a row met volumes that cannot be read; the last one: "
            f"{last_error}. Check --store_dir (scripts/prepare_volumes.py rebuilds what is damaged)"
        )

    def make_views(self, batch: Mapping, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """A batch on a device, with crops and views.

        Args:
            batch: collated samples of `cut`, on the CPU; one that has its views already is moved alone.

        Returns:
            The entries of `__getitem__`, each [B, ...].
        """
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "draws"}
        return moved | self.view_maker.make(moved.pop("hu"), batch["draws"]) if "hu" in moved else moved

    def places(self, index: int) -> Places:
        """Where sample `index` would be cut if no volume were broken; reads no voxel."""
        return self._draw(index, 0, np.random.SeedSequence([self.seed, index, 0]).spawn(1)[0])

    def broken_names(self) -> list[str]:
        """Cases that could not be read so far, in this process or in any of its loader's workers."""
        return [name for name, broken in zip(self.store.names, self._is_broken.tolist()) if broken]

    def statistics(self) -> dict:
        """Plain facts for logs: cases, broken volumes, and what the rule can draw from."""
        return {"num_cases": len(self.names), "broken": self.broken_names(), **self.pairing.statistics()}

    def case_names(self, batch: Mapping[str, torch.Tensor]) -> list[str]:
        """The names of a batch's (or a sample's) cases, in its order."""
        return [self.store.names[index] for index in batch["case"].flatten().tolist()]

    def _draw(self, index: int, attempt: int, seed: np.random.SeedSequence) -> Places:
        rng = np.random.Generator(np.random.Philox(seed))
        case = self._dealt_case(index) if attempt == 0 else int(rng.integers(len(self.names)))
        draw = self.pairing.draw if attempt < PAIRED_ATTEMPTS else self.pairing.draw_alone
        return draw(rng, case)

    def _dealt_case(self, index: int) -> int:
        """The first case of sample `index`: position `index % n` of the permutation of its epoch."""
        epoch, position = divmod(index, len(self.names))
        if self._deal[0] != epoch:  # kept for speed only
            order = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch]))).permutation(
                len(self.names)
            )
            self._deal = (epoch, order)
        return int(self._deal[1][position])

    def _cut(self, name: str, point_mm: np.ndarray) -> np.ndarray:
        """An int16 HU crop; a volume that cannot be read is marked and reported once.

        Each crop is tried, whatever happened to others of its volume. A volume with one damaged chunk would otherwise
        be left out from the moment on at which this process met it, and samples would depend on workers and restarts.
        """
        try:
            return cut(self.store, name, point_mm, self.pairing.roi)
        except (OSError, StoreError) as error:
            index = self._store_index[name]
            if not self._is_broken[index]:
                self._is_broken[index] = True
                logger.warning("case %s cannot be read; other samples take the place of its own: %s", name, error)
            raise BrokenVolumeError(f"case {name}: {error}") from error

    def _own_window(self, name: str) -> tuple[float, float] | None:
        """The window of a radiograph or an MR, whose range is its own; None for a CT."""
        if self.store.kind == CT:
            return None
        return self.store.record(name).window(self.crops.a_min, self.crops.a_max)

    def _cut_sample(self, places: Places, crops_hu: list[np.ndarray], seeds: np.random.SeedSequence) -> dict:
        sample = {
            "hu": torch.from_numpy(np.stack(crops_hu)),
            "case": torch.tensor([self._store_index[name] for name in places.names]),
            "centre_mm": torch.from_numpy(places.points_mm.astype(np.float32)),
            "score": torch.tensor(places.score, dtype=torch.float32),
            "is_fallback": torch.tensor(places.is_fallback),
            **{name: torch.from_numpy(value) for name, value in places.facts.items()},
        }
        # Seeds go to masks view by view, then to pictures, at last to points; other orders would change every recorded
        # run.
        for name in [name for name, kind in self.views.items() if kind == "blocks"]:
            rngs = [np.random.Generator(np.random.Philox(seed)) for seed in seeds.spawn(len(crops_hu))]
            sample[name] = torch.stack([draw_mask(rng, self.grid, self.num_masked) for rng in rngs])
        sample["draws"] = self.view_maker.draw(seeds, [self._own_window(name) for name in places.names])
        if self.anatomy is not None:
            sample |= self._anatomy(places, seeds)
        return sample

    def _anatomy(self, places: Places, seeds: np.random.SeedSequence) -> dict[str, torch.Tensor]:
        roi = self.pairing.roi
        records = [self.store.record(name) for name in places.names]
        starts = [start_at(record, point, roi) for record, point in zip(records, places.points_mm)]
        rngs = [np.random.Generator(np.random.Philox(seed)) for seed in seeds.spawn(len(records))]
        return self.anatomy.sample(rngs, records, starts, roi)


class CutSamples(Dataset):
    """The samples of a dataset as loading processes deliver them: cut and drawn; `make_views` does the rest."""

    def __init__(self, dataset: CropDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        """Sample `index` of `CropDataset.cut`."""
        return self.dataset.cut(index)


def describe_batch(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a batch says of its own samples, for the log: whether the rule fell back, and the score of its match."""
    return {"fallback_share": batch["is_fallback"], "pair_score": batch["score"]}


def summarise_places(drawn: Sequence[Places]) -> dict:
    """Plain statistics of samples' places: how many, how many fell back, and the mean score of the others."""
    scores = [places.score for places in drawn if not places.is_fallback]
    num_fallback = len(drawn) - len(scores)
    return {
        "num_pairs": len(drawn),
        "num_fallback": num_fallback,
        "share_fallback": num_fallback / max(1, len(drawn)),
        "mean_score": float(np.mean(scores)) if scores else 0.0,
    }


def check_depth(store, roi: Sequence[int]) -> None:
    """Raise ValueError for crops of radiographs that are thicker than these."""
    if store.kind == RADIOGRAPH and roi[0] != 1:
        raise ValueError(f"--roi_z {roi[0]}: the store holds radiographs, which are one voxel deep; set --roi_z 1")


def check_names(store, names: Sequence[str]) -> list[str]:
    """The cases to draw from, checked against the store.

    Raises:
        ValueError: no case, one that stands twice, or cases that the store lacks.
    """
    names, known = list(names), set(store.names)
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ValueError(
            f"{len(strangers)} of {len(names)} cases are not in the volume store ({', '.join(strangers[:5])}); run "
            "scripts/prepare_volumes.py with this --json_list, or change --store_dir"
        )
    if not names:
        raise ValueError("no cases to draw from; check --json_list and --data_dir")
    if len(set(names)) != len(names):
        raise ValueError("a case stands twice in the list of cases; check --json_list")
    return names
