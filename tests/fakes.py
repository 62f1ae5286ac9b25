"""Stand-ins for tests: a volume store in memory, with the part of `VolumeStore`'s interface that cropping uses, and a
correspondence table and a dataset on top of it."""

from dataclasses import dataclass

import numpy as np

from datasets.ct.images import CT
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.dataset import CropDataset
from datasets.samples.masks import MaskOptions
from datasets.samples.pairings import PAIRINGS, PairingOptions

ROI = (16, 24, 32)
VIEWS = {"student": "augmented", "teacher": "augmented", "mask": "blocks"}


@dataclass(frozen=True, eq=False)
class FakeRecord:
    """The part of `CaseRecord` that cropping uses."""

    name: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    body_start: np.ndarray
    body_stop: np.ndarray
    identity: str = ""


def spl_affine(spacing_mm=(2.0, 2.0, 2.0), origin_mm=(0.0, 0.0, 0.0)) -> np.ndarray:
    """Index (d, h, w) -> world RAS+ mm of an unrotated volume in orientation SPL."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = spacing_mm[0], -spacing_mm[1], -spacing_mm[2]
    affine[:3, 3], affine[3, 3] = origin_mm, 1.0
    return affine


class FakeStore:
    """Volumes in memory; reading a case in `broken` raises OSError and is counted in `num_reads` like any other."""

    kind = CT

    def __init__(self, volumes: dict[str, np.ndarray], affines: dict[str, np.ndarray] | None = None, broken=()) -> None:
        self.volumes = volumes
        self.affines = affines or {name: spl_affine() for name in volumes}
        self.names = list(volumes)
        self.broken = set(broken)
        self.num_reads = dict.fromkeys(volumes, 0)

    def __len__(self) -> int:
        return len(self.names)

    def record(self, name: str) -> FakeRecord:
        shape = self.volumes[name].shape
        affine = self.affines[name]
        spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0))
        return FakeRecord(name, shape, spacing, affine, np.zeros(3, dtype=int), np.array(shape))

    def crop(self, name: str, start, size, fill: int = -1024) -> np.ndarray:
        self.num_reads[name] += 1
        if name in self.broken:
            raise OSError(f"{name}: input/output error")
        volume = self.volumes[name]
        low = [max(begin, 0) for begin in start]
        high = [min(begin + side, end) for begin, side, end in zip(start, size, volume.shape)]
        out = np.full(size, fill, dtype=np.int16)
        if all(a < b for a, b in zip(low, high)):
            inside = tuple(slice(a - begin, b - begin) for a, b, begin in zip(low, high, start))
            out[inside] = volume[tuple(slice(a, b) for a, b in zip(low, high))]
        return out


def world_volume(shape=(40, 44, 48), affine: np.ndarray | None = None) -> np.ndarray:
    """HU that spell out where a voxel is: x + 3 y + 5 z in mm, so that a crop shows which place it was cut from."""
    affine = spl_affine() if affine is None else affine
    index = np.stack(np.meshgrid(*[np.arange(side) for side in shape], indexing="ij"), axis=-1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    return np.rint(points @ np.array([1.0, 3.0, 5.0])).astype(np.int16)


def make_store(num: int = 3, broken=(), shape=(40, 44, 48)) -> FakeStore:
    """Cases whose voxels spell out their place; every case lies elsewhere in the world, with its own spacing."""
    affines = {f"case{i}": spl_affine((2.0, 2.0 + 0.1 * i, 2.0), (100 * i, -50 * i, 20 * i)) for i in range(num)}
    return FakeStore({name: world_volume(shape, affine) for name, affine in affines.items()}, affines, broken)


def make_table(store: FakeStore, num: int = 60, score: float = 0.9, seed: int = 0) -> CorrespondenceTable:
    """Matches between random cases: the same voxel index, wherever that lies in either world."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(num, ROW_DTYPE)
    for row in rows:
        query, key = rng.choice(len(store), 2, replace=False)
        index = rng.uniform(0, np.array(store.record(store.names[0]).shape) - 1)
        for side, case in (("query", query), ("key", key)):
            row[f"{side}_case"] = case
            affine = store.record(store.names[case]).affine
            row[f"{side}_mm"] = affine[:3, :3] @ index + affine[:3, 3]
    rows["score"], rows["cycle_mm"] = score, 3.0
    return CorrespondenceTable.from_rows(store.names, rows)


def make_dataset(
    pairing: str = "sam",
    store=None,
    table=None,
    names=None,
    views=VIEWS,
    crops=None,
    masks=None,
    augment=None,
    seed=0,
    roi=ROI,
    anatomy=None,
    **options,
) -> CropDataset:
    """Samples of a fake or real store, by default with Alice's views; `options` are those of `PairingOptions`."""
    store = store or make_store()
    rule = PAIRINGS[pairing]
    table = table or (make_table(store) if rule.needs_table else None)
    names = store.names if names is None else names
    drawn = rule(store, names, roi, PairingOptions(**options), table)
    return CropDataset(store, drawn, views, crops, masks or MaskOptions(mask_block=8), augment, seed, anatomy=anatomy)
