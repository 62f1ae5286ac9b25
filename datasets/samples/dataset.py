"""The paired-crop dataset: sample i is two crops, their augmented views and their masks, a pure function of (seed, i).

Alice's two views Q and K (ICCV 2023, figure 2) are crops of one size whose places a pairing rule chooses
(`pairings.py`). Every random choice of sample i comes from NumPy's `SeedSequence([seed, i, attempt])`, so that neither
ranks, workers, restarts nor the order of reading change it. Query cases are dealt like cards: each run of `num_cases`
samples visits every case once, in an order of its own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.samples.augment import AugmentOptions, ViewAugmenter, window
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.crops import cut
from datasets.samples.masks import draw_mask, mask_grid, num_masked_blocks
from datasets.samples.pairings import PAIR_KINDS, IouPairing, PairDraw, PairingOptions, SamPairing, make_pairing
from datasets.store.format import StoreError

MAX_ATTEMPTS = 20  # broken volumes in a row for one sample; more than that is no accident
PAIRED_ATTEMPTS = 10  # after these, a pair from one volume: with few cases every pair may contain the broken one

logger = logging.getLogger(__name__)


class BrokenVolumeError(ValueError):
    """A crop that could not be read; the dataset reports its volume once and draws another pair."""


class PairedCropDataset(Dataset):
    """Paired crops of a volume store.

    Args:
        store: a `VolumeStore` (or anything with `names`, `record` and `crop`).
        table: correspondences in world mm; needed by `sam` alone.
        pairing: a name in `pairings.PAIRINGS`.
        roi: crop size (D, H, W) in voxels.
        hu_min, hu_max: window in HU that becomes [0, 1].
        mask_ratio: share of blocks that the student does not see, [0, 1) (0 = off).
        mask_block: side of a mask block in voxels; divides every side of `roi`.
        min_score, max_cycle_mm, iou_range, jitter_mm, max_outside: see `pairings.PairingOptions`.
        augment: intensity augmentation of the four views; None = the defaults, `AugmentOptions.off()` = none.
        seed: every choice depends on it, 0 or more.
        case_names: the cases to draw from (default: all of the store); table rows with a case outside are dropped.
    """

    def __init__(
        self,
        store,
        table: CorrespondenceTable | None,
        pairing: str,
        roi: Sequence[int],
        hu_min: float = -125.0,
        hu_max: float = 225.0,
        mask_ratio: float = 0.75,
        mask_block: int = 16,
        min_score: float = PairingOptions.min_score,
        max_cycle_mm: float = PairingOptions.max_cycle_mm,
        iou_range: Sequence[float] = (0.3, 0.6),
        jitter_mm: float = PairingOptions.jitter_mm,
        max_outside: float = PairingOptions.max_outside,
        augment: AugmentOptions | None = None,
        seed: int = 0,
        case_names: Sequence[str] | None = None,
    ) -> None:
        if hu_max <= hu_min:
            raise ValueError(f"--a_min {hu_min} must lie below --a_max {hu_max} (HU window)")
        if seed < 0:
            raise ValueError(f"--seed is {seed}, expected 0 or more")
        self.store = store
        self.names = _chosen_names(store, case_names)
        self.roi = tuple(int(side) for side in roi)
        self.grid = mask_grid(self.roi, mask_block)
        self.num_masked = num_masked_blocks(self.grid, mask_ratio)
        options = PairingOptions(self.roi, min_score, max_cycle_mm, tuple(iou_range), jitter_mm, max_outside)
        self.pairing = make_pairing(pairing, store, self.names, options, table)
        self._one_volume = IouPairing(store, self.names, options)
        self.augmenter = ViewAugmenter(augment or AugmentOptions(), hu_min, hu_max)
        self.hu_min, self.hu_max, self.seed = hu_min, hu_max, seed
        self._store_index = {name: index for index, name in enumerate(store.names)}
        # Shared with the loader's workers, so that a broken volume is reported once and counted in the main process.
        self._is_broken = torch.zeros(len(store.names), dtype=torch.bool).share_memory_()
        self._deal: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        """Samples of one epoch: each case is the query once. Indices beyond it are valid and go on without an end."""
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index` (0 or more, no upper end).

        Returns:
            "query", "key": float32 [1, D, H, W] in [0, 1], windowed and not augmented (reconstruction targets);
            "query_student", "query_teacher", "key_student", "key_teacher": the same crops, each augmented on its own;
            "query_mask", "key_mask": bool on the block grid (roi / mask_block), True = masked = in the loss;
            "query_case", "key_case": int64 index into `store.names`; "query_mm", "key_mm": float32 [3], crop centres in
            world mm; "score": float32; "is_fallback": bool; "pair_kind": int64 index into `PAIR_KINDS`.

        Raises:
            BrokenVolumeError: `MAX_ATTEMPTS` pairs in a row met unreadable volumes.
        """
        for attempt in range(MAX_ATTEMPTS):
            seeds = np.random.SeedSequence([self.seed, int(index), attempt]).spawn(7)
            draw = self._draw(int(index), attempt, seeds[0])
            try:
                query_hu = self._cut(draw.query_name, draw.query_mm)
                key_hu = self._cut(draw.key_name, draw.key_mm)
            except BrokenVolumeError as error:
                last_error = error
                continue
            return self._sample(draw, query_hu, key_hu, seeds[1:])
        raise BrokenVolumeError(
            f"sample {index}: {MAX_ATTEMPTS} pairs in a row met volumes that cannot be read; the last one: "
            f"{last_error}. Check --store_dir (scripts/prepare_volumes.py rebuilds what is damaged)"
        )

    def draw_pair(self, index: int) -> PairDraw:
        """Where sample `index` would be cut if no volume were broken; reads no voxel."""
        return self._draw(index, 0, np.random.SeedSequence([self.seed, index, 0]).spawn(1)[0])

    def broken_names(self) -> list[str]:
        """Cases that could not be read so far, in this process or in any of its loader's workers."""
        return [name for name, broken in zip(self.store.names, self._is_broken.tolist()) if broken]

    def statistics(self) -> dict:
        """Plain facts for logs: cases, usable rows, cases that can only fall back, broken volumes."""
        facts = {"num_cases": len(self.names), "broken": self.broken_names()}
        if isinstance(self.pairing, SamPairing):
            facts["num_rows"] = len(self.pairing.table)
            facts["num_usable_rows"] = self.pairing.num_usable_rows
            facts["num_cases_without_rows"] = self.pairing.num_cases_without_rows
        return facts

    def _draw(self, index: int, attempt: int, seed: np.random.SeedSequence) -> PairDraw:
        rng = np.random.Generator(np.random.Philox(seed))
        case = self._dealt_case(index) if attempt == 0 else int(rng.integers(len(self.names)))
        if attempt < PAIRED_ATTEMPTS:
            draw = self.pairing.draw(rng, case)
        else:
            draw = replace(self._one_volume.draw(rng, case), is_fallback=True)
        return draw.swapped() if rng.random() < 0.5 else draw

    def _dealt_case(self, index: int) -> int:
        """The query case of sample `index`: position `index % n` of the permutation of its epoch."""
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
            return cut(self.store, name, point_mm, self.roi)
        except (OSError, StoreError) as error:
            index = self._store_index[name]
            if not self._is_broken[index]:
                self._is_broken[index] = True
                logger.warning("case %s cannot be read; other pairs take the place of its own: %s", name, error)
            raise BrokenVolumeError(f"case {name}: {error}") from error

    def _sample(
        self, draw: PairDraw, query_hu: np.ndarray, key_hu: np.ndarray, seeds: list[np.random.SeedSequence]
    ) -> dict[str, torch.Tensor]:
        mask_rngs = [np.random.Generator(np.random.Philox(seed)) for seed in seeds[:2]]
        return {
            "query": window(query_hu, self.hu_min, self.hu_max),
            "key": window(key_hu, self.hu_min, self.hu_max),
            "query_student": self.augmenter(query_hu, seeds[2]),
            "query_teacher": self.augmenter(query_hu, seeds[3]),
            "key_student": self.augmenter(key_hu, seeds[4]),
            "key_teacher": self.augmenter(key_hu, seeds[5]),
            "query_mask": draw_mask(mask_rngs[0], self.grid, self.num_masked),
            "key_mask": draw_mask(mask_rngs[1], self.grid, self.num_masked),
            "query_case": torch.tensor(self._store_index[draw.query_name]),
            "key_case": torch.tensor(self._store_index[draw.key_name]),
            "query_mm": torch.from_numpy(draw.query_mm.astype(np.float32)),
            "key_mm": torch.from_numpy(draw.key_mm.astype(np.float32)),
            "score": torch.tensor(draw.score, dtype=torch.float32),
            "is_fallback": torch.tensor(draw.is_fallback),
            "pair_kind": torch.tensor(PAIR_KINDS.index(draw.kind)),
        }


def _chosen_names(store, case_names: Sequence[str] | None) -> list[str]:
    """The cases to draw from, checked against the store."""
    names = list(store.names) if case_names is None else list(case_names)
    known = set(store.names)
    strangers = [name for name in names if name not in known]
    if strangers:
        raise ValueError(
            f"{len(strangers)} of {len(names)} cases are not in the volume store ({', '.join(strangers[:5])}); run "
            "scripts/prepare_volumes.py with this --json_list, or change --store_dir"
        )
    if not names:
        raise ValueError("no cases to draw pairs from; check --json_list and --data_dir")
    if len(set(names)) != len(names):
        raise ValueError("a case stands twice in the list of cases; check --json_list")
    return names


# What kinds of pairs a run has trained on: counts of kinds and fallbacks, and mean scores, gathered from batches.


class PairStatistics:
    """Counts over batches of `PairedCropDataset`.

    `totals` is one float64 vector of sums, so that ranks are joined by summing it (`all_reduce`), and a checkpoint can
    keep it: [number of pairs, of fallbacks, number of each kind..., sum of scores of each kind...].
    """

    def __init__(self) -> None:
        self.totals = torch.zeros(2 + 2 * len(PAIR_KINDS), dtype=torch.float64)

    def add(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Count a batch (or one sample): its "pair_kind", "is_fallback" and "score"."""
        num_kinds = len(PAIR_KINDS)
        kind = torch.atleast_1d(batch["pair_kind"]).cpu()
        score = torch.atleast_1d(batch["score"]).cpu().double()
        self.totals[0] += len(kind)
        self.totals[1] += batch["is_fallback"].sum().cpu()
        self.totals[2 : 2 + num_kinds] += torch.bincount(kind, minlength=num_kinds)
        self.totals[2 + num_kinds :].index_add_(0, kind, score)

    def add_draw(self, draw: PairDraw) -> None:
        """Count a pair that was drawn and not cut."""
        self.add(
            {
                "pair_kind": torch.tensor(PAIR_KINDS.index(draw.kind)),
                "is_fallback": torch.tensor(draw.is_fallback),
                "score": torch.tensor(draw.score),
            }
        )

    def summary(self) -> dict:
        """Plain values: num_pairs, num_fallback, share_fallback, and per kind met num_<kind> and mean_score_<kind>."""
        num_kinds = len(PAIR_KINDS)
        totals = self.totals.tolist()
        counts, scores = totals[2 : 2 + num_kinds], totals[2 + num_kinds :]
        facts = {
            "num_pairs": int(totals[0]),
            "num_fallback": int(totals[1]),
            "share_fallback": totals[1] / max(totals[0], 1.0),
        }
        for name, count, score in zip(PAIR_KINDS, counts, scores):
            if count:
                facts[f"num_{name}"] = int(count)
                facts[f"mean_score_{name}"] = score / count
        return facts
