"""Pairing rules: which V places of which volumes make one sample.

- `sam` (Alice, ICCV 2023, figure 2): the same anatomy in two patients, from the correspondence table;
- `iou`: two crops of one volume whose intersection over union lies in a range, the positives of the IoU-based peers;
  of crops of depth 1 (slices) both lie in one slice;
- `random`: random crops of two different volumes, the control that any pairing must beat;
- `grid` (VoCo, CVPR 2024): base crops that tile a region of one volume, and random crops inside that region;
- `grid_sam`: such a region in two patients at the same anatomy, from the correspondence table.

All rules of two places draw the first crop in the same way, anywhere in the box of the body: they differ in the second
alone. (Crops centred at matched points, as published, overhang the body, and networks learn less from them.)

A rule is a subclass of `Pairing` with `draw_places`; adding one takes a class and a line in `PAIRINGS`. Every draw is a
function of the generator alone. A rule that cannot keep its promise falls back and says so (`is_fallback`).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from datasets.ct.geometry import world_to_index
from datasets.samples.correspondences import ANY_MM, CorrespondenceTable, Selection
from datasets.samples.crops import (
    body_start_range,
    centre_mm,
    crop_iou,
    draw_centre,
    draw_starts,
    shared_shift_mm,
    start_at,
)
from datasets.samples.grid import base_starts, draw_inner_starts, overlap_shares, region_size

FIRST_DRAWS = 4  # 4 first crops with 30 second crops each: the 120 draws of the published rule
SECOND_DRAWS = 30
NEAR_MM = 1e-3  # points so near to each other are one
SMALL_BODY_OVERHANG = 0.25  # of the side: how far crops of a body too small for the wanted IoU may overhang it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Where the V crops of one sample lie.

    Attributes:
        names: the case of each crop.
        points_mm: float64 [V, 3], crop centres in world mm.
        score: similarity of the match (`sam`, `grid_sam`), the crops' IoU (pairs within one volume), or 0.
        is_fallback: the rule could not be kept, and a lesser sample stands in.
        facts: more of what the rule knows about the sample, by the name that it gets in a batch.
    """

    names: tuple[str, ...]
    points_mm: np.ndarray
    score: float = 0.0
    is_fallback: bool = False
    facts: dict[str, np.ndarray] = field(default_factory=dict)

    def reversed(self) -> "Places":
        """The same crops in the opposite order."""
        return replace(self, names=self.names[::-1], points_mm=self.points_mm[::-1])


@dataclass(frozen=True)
class PairingOptions:
    """What the rules need to know besides the volumes and the crop's size.

    Attributes:
        min_score: lowest score of a matched pair, -1 to 1; -1 = any
        max_cycle_mm: largest cycle error of a matched pair, mm; 1e6 = any
        max_spread_mm: largest disagreement of a matched pair's neighbours about its place, mm; 1e6 = any
        iou_range: IoU of two crops of one volume, low high
        jitter_mm: how far both crops of a matched pair may lie off its points, by the same vector, along each axis, mm;
            0 = centred at the points, as published, where --max_outside 1 leaves them there
        max_outside: share of a crop's side, 0 to 1, by which the two crops of a match may overhang the bodies' boxes:
            further out, one vector moves both; 1 = they stay where they are, as published
        grid_bases: base crops of a grid: along W (left), along H (posterior)
        grid_crops: random crops inside the region of a grid
    """

    # Score and cycle: 95 % of pairs of held-out phantoms are right within 15 mm, with the SAM of benchmarks/RESULTS.md.
    # A SAM trained for less makes fewer right: scripts/evaluate_matching.py chooses thresholds for it.
    min_score: float = 0.65
    max_cycle_mm: float = 18.0
    max_spread_mm: float = ANY_MM
    iou_range: tuple[float, float] = (0.3, 0.6)
    jitter_mm: float = 30.0
    max_outside: float = 0.0
    grid_bases: tuple[int, int] = (3, 3)
    grid_crops: int = 2

    def __post_init__(self) -> None:
        low, high = self.iou_range
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"--iou_range is {low} {high}, expected 0 <= low <= high <= 1")
        if min(self.jitter_mm, self.max_cycle_mm, self.max_spread_mm) < 0 or not 0.0 <= self.max_outside <= 1.0:
            raise ValueError(
                "expected --jitter_mm, --max_cycle_mm, --max_spread_mm of 0 or more and --max_outside in [0, 1], got "
                f"{self.jitter_mm:g}, {self.max_cycle_mm:g}, {self.max_spread_mm:g} and {self.max_outside:g}"
            )
        if min(self.grid_bases) < 1 or max(self.grid_bases) < 2:
            raise ValueError(f"--grid_bases is {self.grid_bases[0]} {self.grid_bases[1]}, expected two or more bases")
        if self.grid_crops < 1:
            raise ValueError(f"--grid_crops {self.grid_crops}: expected 1 or more")


class Pairing:
    """What all rules share: the volumes, the crop's size, and which of two crops comes first.

    Attributes:
        needs_table: whether it reads a correspondence table.
        is_ordered: the order of the crops says what they are; otherwise chance decides which one comes first.
    """

    needs_table = False
    is_ordered = False

    def __init__(
        self,
        store,
        names: Sequence[str],
        roi: Sequence[int],
        options: PairingOptions | None = None,
        table: CorrespondenceTable | None = None,
        patient_of: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to draw from the cases `names` of `store`.

        Args:
            roi: the crop (D, H, W) in voxels.
            table: matched points, for the rules that need them.
            patient_of: case -> patient; a case that it does not hold is a patient of its own.
        """
        self.store, self.names, self.roi = store, list(names), tuple(int(side) for side in roi)
        self.options = options or PairingOptions()
        self.table = table
        self.patients = [(patient_of or {}).get(name, name) for name in self.names]
        self.num_patients = len(set(self.patients))

    @classmethod
    def num_crops(cls, options: PairingOptions) -> int:
        """V, the crops of one sample."""
        return 2

    def draw(self, rng: np.random.Generator, case: int) -> Places:
        """The places of one sample of `names[case]`, in an order of chance where the rule gives none."""
        places = self.draw_places(rng, case)
        return places.reversed() if not self.is_ordered and rng.random() < 0.5 else places

    def draw_places(self, rng: np.random.Generator, case: int) -> Places:
        """The places of one sample, those of `names[case]` first."""
        raise NotImplementedError

    def draw_alone(self, rng: np.random.Generator, case: int) -> Places:
        """A sample of one volume, for a corpus in which every pair meets a broken one; counted as a fallback."""
        return replace(IouPairing(self.store, self.names, self.roi, self.options).draw(rng, case), is_fallback=True)

    def statistics(self) -> dict:
        """Plain facts about what this rule can draw from, for logs."""
        return {}


class IouPairing(Pairing):
    """Two overlapping crops of one volume, or, where crops are one voxel deep, of one slice (IoU-based positives).

    The first crop lies anywhere in the body; the second is redrawn up to 30 times until the IoU lies in the range, then
    the first is drawn anew, up to 120 draws in all; after that two random crops of that volume or slice stand in as a
    fallback.
    (In a large volume hardly one crop in a thousand overlaps another, so the second is drawn from its neighbourhood.)
    """

    def draw_places(self, rng: np.random.Generator, case: int) -> Places:
        """A pair within `names[case]`."""
        record, roi = self.store.record(self.names[case]), np.asarray(self.roi)
        low, high = self.options.iou_range
        may_differ = roi > 1  # axes along which the two crops may begin at different voxels
        first, last = body_start_range(record, roi, 0.0)
        # A small body: without overhang no two crops lie far enough apart.
        if crop_iou(first[may_differ], last[may_differ], roi[may_differ]) > low:
            first, last = body_start_range(record, roi, SMALL_BODY_OVERHANG)
        # An IoU of at least `low` takes an overlap of 2 low / (1 + low) of the side along every axis. Second crops
        # farther away can only be refused, so they are not drawn: the accepted ones are distributed as if they were.
        reach = np.floor(roi * (1 - 2 * low / (1 + low))).astype(np.int64) if low > 0 else last - first
        reach = np.where(may_differ, reach, 0)
        for _ in range(FIRST_DRAWS):
            start = draw_starts(rng, first, last, 1)[0]
            near = np.maximum(first, start - reach), np.minimum(last, start + reach)
            seconds = draw_starts(rng, *near, SECOND_DRAWS)
            iou = crop_iou(start, seconds, roi)
            hits = np.flatnonzero((iou >= low) & (iou <= high))
            if len(hits):
                return self._pair(record, start, seconds[hits[0]], False)
        start, second = draw_starts(rng, first, last, 2)
        return self._pair(record, start, np.where(may_differ, second, start), True)

    def _pair(self, record, start: np.ndarray, second: np.ndarray, is_fallback: bool) -> Places:
        points = centre_mm(record, np.stack([start, second]), self.roi)
        return Places((record.name, record.name), points, float(crop_iou(start, second, self.roi)), is_fallback)


class RandomPairing(Pairing):
    """Random crops of two patients' volumes; with a single patient both come from one volume, counted as a fallback."""

    def draw_places(self, rng: np.random.Generator, case: int) -> Places:
        """A pair of `names[case]` and any case of another patient."""
        other = case
        while self.patients[other] == self.patients[case] and self.num_patients > 1:
            other = (case + int(rng.integers(1, len(self.names)))) % len(self.names)
        names = (self.names[case], self.names[other])
        points = np.stack([draw_centre(rng, self.store.record(name), self.roi) for name in names])
        return Places(names, points, is_fallback=other == case)


class SamPairing(Pairing):
    """The same anatomy in two patients: a row of the correspondence table that passes both thresholds.

    The query crop is drawn anywhere in the body; of the rows whose point lies nearest to its centre, one at random says
    where that place is in another patient, and the key crop lies as far off its point as the query crop off its own. A
    case without a row gives an `iou` pair of its own, counted as a fallback.
    """

    needs_table = True

    def __init__(
        self,
        store,
        names: Sequence[str],
        roi: Sequence[int],
        options: PairingOptions | None = None,
        table: CorrespondenceTable | None = None,
        patient_of: Mapping[str, str] | None = None,
    ) -> None:
        """As every rule, with the table; ValueError where it is missing or of other volumes."""
        super().__init__(store, names, roi, options, table, patient_of)
        if table is None:
            raise ValueError(
                "--pairing sam needs a correspondence table; mine one (scripts/mine_pairs.py) and give its folder as "
                "--embed_dir, or choose --pairing iou or random"
            )
        table.check_cases(store.names)
        table.check_sources({name: store.record(name).identity for name in self.names})
        self.fallback = IouPairing(store, names, roi, self.options)
        self.selection = self._select()
        position = {name: index for index, name in enumerate(table.case_names)}
        self.table_case = [position.get(name, -1) for name in self.names]
        self._warn_of_cases_without_rows()
        self._check_places()

    def draw_places(self, rng: np.random.Generator, case: int) -> Places:
        """A matched pair whose first crop is of `names[case]`."""
        match = self._draw_match(rng, case, self.roi)
        return match or replace(self.fallback.draw_places(rng, case), is_fallback=True)

    def _draw_match(self, rng: np.random.Generator, case: int, size: tuple[int, int, int]) -> Places | None:
        """The centres of matched boxes of `size` voxels, the first in `names[case]`; None for a case without a row."""
        table_case = self.table_case[case]
        candidates = self.selection.of_case(table_case) if table_case >= 0 else ()
        if len(candidates) == 0:
            return None
        query = self.store.record(self.names[case])
        centre = draw_centre(rng, query, size)
        row = self._nearest_row(rng, candidates, centre)
        key = self.store.record(self.table.case_names[row["key_case"]])
        offset = np.clip(centre - row["query_mm"], -self.options.jitter_mm, self.options.jitter_mm)
        query_mm, key_mm = row["query_mm"] + offset, row["key_mm"] + offset
        shift = shared_shift_mm(query, query_mm, key, key_mm, size, self.options.max_outside)
        return Places((query.name, key.name), np.stack([query_mm + shift, key_mm + shift]), float(row["score"]))

    def _nearest_row(self, rng: np.random.Generator, candidates: np.ndarray, centre_mm: np.ndarray) -> np.void:
        """One of the rows with the query point nearest to a place: a point has a row for each of its partners."""
        squared = ((self.table.rows["query_mm"][candidates] - centre_mm) ** 2).sum(axis=1)
        nearest = candidates[squared <= squared.min() + NEAR_MM**2]
        return self.table.rows[int(nearest[rng.integers(len(nearest))])]

    @property
    def num_cases_without_rows(self) -> int:
        """Cases in use that can only give fallback pairs."""
        counts = self.selection.num_per_case
        return sum(1 for case in self.table_case if case < 0 or counts[case] == 0)

    def statistics(self) -> dict:
        """Rows of the table, those that pass the thresholds between cases in use, and cases without any."""
        return {
            "num_rows": len(self.table),
            "num_usable_rows": len(self.selection.rows),
            "num_cases_without_rows": self.num_cases_without_rows,
        }

    def _select(self) -> Selection:
        used = set(self.names)
        allowed = np.array([name in used for name in self.table.case_names])
        limits = self.options.min_score, self.options.max_cycle_mm, self.options.max_spread_mm
        patient_of = dict(zip(self.names, self.patients))
        patients = np.unique([patient_of.get(name, name) for name in self.table.case_names], return_inverse=True)[1]
        selection = self.table.select(*limits, allowed, patients)
        if len(selection.rows) == 0:
            logger.warning(
                "no correspondence of these %d cases passes --min_score %g, --max_cycle_mm %g and --max_spread_mm %g "
                "(of %d rows in all): every pair will be a fallback from one volume",
                len(self.names), *limits, len(self.table),
            )  # fmt: skip
        return selection

    def _warn_of_cases_without_rows(self) -> None:
        """Few held-out cases among many others: partners drawn from all hardly ever are held-out ones too."""
        if len(self.selection.rows) and self.num_cases_without_rows > len(self.names) / 4:
            logger.warning(
                "%d of these %d cases have no usable correspondence with another of them, so that their pairs are "
                "fallbacks from one volume; mine with scripts/mine_pairs.py --json_list, which pairs the cases of a "
                "section among themselves, or lower --min_score",
                self.num_cases_without_rows, len(self.names),
            )  # fmt: skip

    def _check_places(self) -> None:
        """Raise when matched points do not lie in the volumes that they name: the table is of other data or axes."""
        rows = self.selection.rows
        sample = self.table.rows[rows[:: max(1, len(rows) // 500)]] if len(rows) else []
        num_outside = 0
        for row in sample:
            for side in ("query", "key"):
                record = self.store.record(self.table.case_names[row[f"{side}_case"]])
                index = world_to_index(record.affine, row[f"{side}_mm"])
                num_outside += bool(((index < -1) | (index > np.asarray(record.shape))).any())
        if num_outside > 0.02 * 2 * len(sample):
            raise ValueError(
                f"{self.table.path or 'correspondence table'}: {num_outside} of {2 * len(sample)} checked points lie "
                "outside of the volumes that they name; the table was mined from other files or in other axes: "
                "mine again from this --store_dir"
            )


class GridPairing(Pairing):
    """Base crops that tile a region of one volume, then random crops inside that region.

    The region lies anywhere in the body's box. Where the body is smaller, the region contains it and crops hold air. A
    sample is N base crops and R random ones; the fact "overlap" [R, N] is the share of each random crop on each base.
    """

    is_ordered = True

    @classmethod
    def num_crops(cls, options: PairingOptions) -> int:
        """Base crops and random ones."""
        return options.grid_bases[0] * options.grid_bases[1] + options.grid_crops

    def draw_places(self, rng: np.random.Generator, case: int) -> Places:
        """A region of `names[case]`."""
        record = self.store.record(self.names[case])
        region = region_size(self.options.grid_bases, self.roi)
        start = draw_starts(rng, *body_start_range(record, region, 0.0), 1)[0]
        return self.places_at(record, start + self.draw_layout(rng))

    def draw_layout(self, rng: np.random.Generator) -> np.ndarray:
        """Starts of base crops and random crops, voxels from the region's first one, int64 [N + R, 3]."""
        bases, roi = self.options.grid_bases, self.roi
        return np.concatenate([base_starts(bases, roi), draw_inner_starts(rng, bases, roi, self.options.grid_crops)])

    def places_at(self, record, starts: np.ndarray) -> Places:
        """Crops of one volume that begin at these voxels [N + R, 3], base crops first."""
        num_bases = len(starts) - self.options.grid_crops
        overlap = overlap_shares(starts[num_bases:], starts[:num_bases], self.roi)
        points = centre_mm(record, starts, self.roi)
        return Places((record.name,) * len(starts), points, facts={"overlap": overlap})

    def draw_alone(self, rng: np.random.Generator, case: int) -> Places:
        """As always: a sample is of one volume."""
        return self.draw_places(rng, case)


class GridSamPairing(SamPairing):
    """The crops of `grid` in a volume, then the same ones around the matched place of another patient.

    Each crop lies as many mm from the centre of its region as its counterpart in the other volume. Their labels are
    counted in each volume, since voxels may differ in size: the fact "overlap" is [2, R, N]. A case without a row gives
    two regions of its own, each drawn by itself, counted as a fallback.
    """

    is_ordered = True

    @cached_property
    def grid(self) -> GridPairing:
        """The rule for one volume."""
        return GridPairing(self.store, self.names, self.roi, self.options)

    @classmethod
    def num_crops(cls, options: PairingOptions) -> int:
        """Those of two regions."""
        return 2 * GridPairing.num_crops(options)

    def draw_places(self, rng: np.random.Generator, case: int) -> Places:
        """Two regions, the first of `names[case]`."""
        region = region_size(self.options.grid_bases, self.roi)
        match = self._draw_match(rng, case, region)
        if match is None:
            return self.draw_alone(rng, case)
        query, key = (self.store.record(name) for name in match.names)
        starts = [start_at(record, point, region) for record, point in zip((query, key), match.points_mm)]
        first = self.grid.places_at(query, starts[0] + self.grid.draw_layout(rng))
        shift_mm = centre_mm(key, starts[1], region) - centre_mm(query, starts[0], region)
        moved = np.stack([start_at(key, point, self.roi) for point in first.points_mm + shift_mm])
        return both_regions(first, self.grid.places_at(key, moved), match.score)

    def draw_alone(self, rng: np.random.Generator, case: int) -> Places:
        """Two regions of `names[case]`."""
        first, second = (self.grid.draw_places(rng, case) for _ in range(2))
        return both_regions(first, second, is_fallback=True)


def both_regions(first: Places, second: Places, score: float = 0.0, is_fallback: bool = False) -> Places:
    """The crops of two regions as one sample; their facts [...] become [2, ...]."""
    facts = {name: np.stack([value, second.facts[name]]) for name, value in first.facts.items()}
    points = np.concatenate([first.points_mm, second.points_mm])
    return Places(first.names + second.names, points, score, is_fallback, facts)


PAIRINGS: dict[str, type[Pairing]] = {
    "sam": SamPairing,
    "iou": IouPairing,
    "random": RandomPairing,
    "grid": GridPairing,
    "grid_sam": GridSamPairing,
}
