"""Orientation, world coordinates, resampling and the body mask."""

import itertools
import time
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from monai.transforms import Orientation
from scipy import ndimage
from scipy.spatial.transform import Rotation

from datasets.ct.geometry import (
    CANONICAL_AXCODES,
    body_mask,
    index_to_world,
    mask_box,
    resample,
    resampled_grid,
    spacing_of,
    to_canonical,
    world_to_index,
)
from datasets.ct.nifti import read_ct
from tests.shared import shared_file

PAIRS = ("RL", "AP", "SI")
ORIENTATIONS = [
    "".join(PAIRS[axis][flip[axis]] for axis in order)
    for order in itertools.permutations(range(3))
    for flip in itertools.product((0, 1), repeat=3)
]


def file_affine(axcodes: str, spacing_mm: np.ndarray, tilt_deg: float = 0.0, seed: int = 0) -> np.ndarray:
    """An affine whose nearest axes are `axcodes`, turned by `tilt_deg` about a random axis."""
    rng = np.random.default_rng(seed)
    directions = np.zeros((3, 3))
    for axis, code in enumerate(axcodes):
        world = next(index for index, pair in enumerate(PAIRS) if code in pair)
        directions[world, axis] = 1 if code in "RAS" else -1
    axis = rng.normal(size=3)
    turn = Rotation.from_rotvec(np.deg2rad(tilt_deg) * axis / np.linalg.norm(axis)).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ directions * spacing_mm
    affine[:3, 3] = rng.uniform(-300, 300, size=3)
    return affine


def blobs(points_mm: np.ndarray) -> np.ndarray:
    """A smooth function of world position: three Gaussian blobs on a slope, in HU."""
    values = 20 + 0.5 * points_mm[..., 0] - 0.3 * points_mm[..., 1] + 0.2 * points_mm[..., 2]
    for centre, width in (((5, -8, 3), 9), ((-14, 10, -12), 7), ((12, 12, 15), 8)):
        values = values + 400 * np.exp(-((points_mm - np.array(centre)) ** 2).sum(axis=-1) / (2 * width**2))
    return values


def grid_mm(shape: tuple, affine: np.ndarray) -> np.ndarray:
    return index_to_world(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1))


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@pytest.mark.parametrize("tilt_deg", [0.0, 17.0])
def test_every_orientation_becomes_canonical_and_voxels_stay_in_place(axcodes, tilt_deg):
    rng = np.random.default_rng(ORIENTATIONS.index(axcodes))
    affine = file_affine(axcodes, rng.uniform(0.5, 6, size=3), tilt_deg, seed=ORIENTATIONS.index(axcodes))
    array = rng.integers(-1000, 1000, size=(5, 6, 7)).astype(np.int16)
    turned, turned_affine = to_canonical(array, affine)
    assert "".join(nib.aff2axcodes(turned_affine)) == CANONICAL_AXCODES == "SPL"

    for index in rng.integers(0, array.shape, size=(20, 3)):
        place = index_to_world(affine, index)
        there = world_to_index(turned_affine, place)
        assert np.allclose(there, np.rint(there), atol=1e-6)
        assert turned[tuple(np.rint(there).astype(int))] == array[tuple(index)]


@pytest.mark.parametrize("axcodes", ORIENTATIONS[::7])
def test_canonical_is_what_monai_calls_spl(axcodes):
    affine = file_affine(axcodes, np.array([0.8, 1.5, 3.0]))
    array = np.random.default_rng(0).normal(size=(4, 5, 6))
    turned, turned_affine = to_canonical(array, affine)
    expected = Orientation(axcodes="SPL")(MetaTensor(array[None], affine=affine))
    assert np.array_equal(turned, expected[0].numpy())
    assert np.allclose(turned_affine, expected.affine.numpy())


def test_world_and_index_are_inverse_for_any_affine():
    rng = np.random.default_rng(1)
    for seed, axcodes in enumerate(ORIENTATIONS):
        affine = file_affine(axcodes, rng.uniform(0.4, 8, size=3), tilt_deg=40 * rng.random(), seed=seed)
        index = rng.uniform(-50, 500, size=(4, 5, 3))
        assert np.allclose(world_to_index(affine, index_to_world(affine, index)), index, atol=1e-8)


def test_index_to_world_by_hand():
    affine = np.array([[0, 0, -2, 10], [0, -3, 0, 20], [5, 0, 0, -30], [0, 0, 0, 1.0]])
    assert np.array_equal(index_to_world(affine, (1, 2, 3)), [4, 14, -25])
    assert spacing_of(affine) == (5, 3, 2)


@pytest.mark.parametrize(
    "old_mm, new_mm",
    [((1, 1, 1), (2, 2, 2)), ((5, 0.8, 0.8), (2, 2, 2)), ((2, 1.5, 1), (1.5, 1.1, 3.3)), ((3, 3, 3), (1, 1.25, 1.5))],
)
def test_resampling_leaves_structures_where_they_are(old_mm, new_mm):
    affine = file_affine("SPL", np.array(old_mm), tilt_deg=12)
    shape = tuple(int(80 / size) for size in old_mm)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    array = blobs(grid_mm(shape, affine)).astype(np.float32)
    new, new_affine = resample(array, affine, new_mm)
    assert np.allclose(spacing_of(new_affine), new_mm)
    truth = blobs(grid_mm(new.shape, new_affine))
    # Linear interpolation is off by at most second derivative x spacing² / 8 an axis; the triangle filter by no more.
    inside = (slice(4, -4),) * 3
    assert np.abs(new - truth)[inside].max() < 3 * 400 * (max(*old_mm, *new_mm) / 7) ** 2 / 8
    # What must not happen at all is a shift: half a voxel off would show here as half a voxel.
    for values in (new[inside], truth[inside]):
        values -= values.min()
    centres = [
        (grid_mm(new.shape, new_affine)[inside] * values[..., None]).sum(axis=(0, 1, 2)) / values.sum()
        for values in (new[inside], truth[inside])
    ]
    assert np.abs(centres[0] - centres[1]).max() < 0.02


def test_resampling_a_ramp_is_exact_away_from_the_border():
    affine = np.diag([2.0, 1.0, 0.7, 1.0])
    d, h, w = np.meshgrid(*map(np.arange, (20, 30, 40)), indexing="ij")
    array = (3.0 * d - 2.0 * h + 1.5 * w).astype(np.float64)
    new, new_affine = resample(array, affine, (1.3, 2.1, 1.6))
    index = world_to_index(affine, grid_mm(new.shape, new_affine))
    expected = index @ [3.0, -2.0, 1.5]
    assert np.allclose(new[3:-3, 3:-3, 3:-3], expected[3:-3, 3:-3, 3:-3], atol=1e-3)


def test_resampled_grid_covers_the_same_field_of_view():
    rng = np.random.default_rng(2)
    for seed in range(30):
        affine = file_affine("SPL", rng.uniform(0.5, 5, size=3), tilt_deg=20, seed=seed)
        shape, spacing_mm = rng.integers(2, 300, size=3), rng.uniform(0.6, 4, size=3)
        new_shape, new_affine = resampled_grid(shape, affine, spacing_mm)
        centres = [index_to_world(a, (np.array(s) - 1) / 2) for s, a in ((shape, affine), (new_shape, new_affine))]
        assert np.allclose(*centres)
        extents = [np.array(s) * spacing_of(a) for s, a in ((shape, affine), (new_shape, new_affine))]
        assert (np.abs(extents[0] - extents[1]) <= np.maximum(spacing_mm / 2, spacing_mm - extents[0]) + 1e-9).all()


def test_shrinking_averages_and_does_not_alias():
    stripes = np.zeros((8, 8, 400), np.int16)
    stripes[..., ::2] = 1000  # the finest pattern there is: at 4 x the spacing only its mean can be shown
    new, _ = resample(stripes, np.eye(4), (1, 1, 4))
    assert np.abs(new[..., 2:-2].astype(int) - 500).max() <= 1
    picked = stripes[..., ::4]
    assert picked.min() == 1000  # what plain picking of voxels would show


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32, np.float64])
def test_resampling_keeps_dtype_and_rounds(dtype):
    array = np.full((10, 11, 12), 7, dtype)
    array[5:] = 8
    new, _ = resample(array, np.eye(4), (0.5, 2, 1))
    assert new.dtype == dtype and new.shape == (20, 6, 12)
    assert new[0, 0, 0] == 7 and new[-1, -1, -1] == 8


def test_labels_are_picked_not_mixed():
    labels = np.random.default_rng(0).choice(np.array([0, 3, 200], np.uint8), size=(20, 21, 22))
    new, new_affine = resample(labels, np.eye(4), (1.7, 0.6, 2.3), order=0)
    assert set(np.unique(new)) <= {0, 3, 200} and new.dtype == np.uint8
    nearest = np.floor(world_to_index(np.eye(4), grid_mm(new.shape, new_affine)) + 0.5).astype(int)
    nearest = np.clip(nearest, 0, np.array(labels.shape) - 1)
    assert (new == labels[tuple(np.moveaxis(nearest, -1, 0))]).mean() > 0.99  # ties may go either way


def test_resampling_to_the_same_spacing_changes_nothing():
    array = np.random.default_rng(0).integers(-1000, 1000, size=(5, 6, 7)).astype(np.int16)
    new, new_affine = resample(array, np.diag([2, 1, 1, 1.0]), (2, 1, 1))
    assert np.array_equal(new, array) and new is not array
    assert np.allclose(new_affine, np.diag([2, 1, 1, 1.0]))


def test_slabs_give_the_same_numbers_as_the_whole(monkeypatch):
    array = np.random.default_rng(0).integers(-1000, 1000, size=(40, 20, 20)).astype(np.int16)
    whole, _ = resample(array, np.diag([2.5, 1, 1, 1.0]), (1.1, 1.3, 1.3))
    monkeypatch.setattr("datasets.ct.geometry.SLAB_VOX", 1000)
    slabs, _ = resample(array, np.diag([2.5, 1, 1, 1.0]), (1.1, 1.3, 1.3))
    assert np.array_equal(whole, slabs)


@pytest.mark.parametrize("spacing_mm", [(0, 1, 1), (1, 1), (1, -1, 1), (1, float("nan"), 1)])
def test_impossible_spacing_is_refused(spacing_mm):
    with pytest.raises(ValueError, match="spacing_mm"):
        resample(np.zeros((3, 3, 3), np.int16), np.eye(4), spacing_mm)


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order"):
        resample(np.zeros((3, 3, 3), np.int16), np.eye(4), (2, 2, 2), order=3)


def test_a_clinical_volume_resamples_within_seconds_and_bounded_memory():
    array = np.zeros((200, 512, 512), np.int16)
    tracemalloc.start()
    start = time.perf_counter()
    new, _ = resample(array, np.diag([2.5, 0.8, 0.8, 1.0]), (1.5, 1.5, 1.5))
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert new.shape == (333, 273, 273)
    assert peak - new.nbytes < 300 * 2**20
    assert seconds < 15  # 0.7 s on one idle core; this only catches a slow path


def patient(shape=(20, 160, 200), spacing_mm=(5.0, 2.0, 2.0)) -> tuple[np.ndarray, np.ndarray]:
    """A body with lungs, on a table whose cradle touches its back, in padding; HU and the true body."""
    y, x = np.meshgrid(np.arange(shape[1]) * spacing_mm[1], np.arange(shape[2]) * spacing_mm[2], indexing="ij")
    body = ((y - 140) / 90) ** 2 + ((x - 200) / 150) ** 2 < 1
    hu = np.full(shape, -1000, np.int16)
    hu[:, (y - 140) ** 2 + (x - 200) ** 2 > 198**2] = -3024
    hu[:, np.abs(y - 232) < 3] = -200  # table top, 6 mm, 92 mm below the middle: it touches the back
    hu[:, np.abs(y - 300) < 3] = 100
    hu[:, body] = 30
    for middle in (130, 270):
        hu[3:17, ((y - 130) / 60) ** 2 + ((x - middle) / 45) ** 2 < 1] = -850
    hu[:, (y - 140) ** 2 + (x - 200) ** 2 < 12**2] = -1000  # gas in the middle
    return hu, np.broadcast_to(body, shape)


def test_body_mask_has_lungs_but_no_table():
    hu, body = patient()
    mask = body_mask(hu, (5.0, 2.0, 2.0))
    assert mask.dtype == bool and mask.shape == hu.shape
    assert mask[body].mean() > 0.995
    assert (mask & ~body).sum() / body.sum() < 0.02
    assert not mask[:, 149:152].any()  # the lower plate
    start, stop = mask_box(body_mask(hu, (5.0, 2.0, 2.0)))
    true_rows, true_columns = np.flatnonzero(body[0].any(axis=1)), np.flatnonzero(body[0].any(axis=0))
    assert start[0] == 0 and stop[0] == 20
    assert np.abs(np.array([start[1], stop[1] - 1]) - true_rows[[0, -1]]).max() <= 3
    assert np.abs(np.array([start[2], stop[2] - 1]) - true_columns[[0, -1]]).max() <= 1


def test_the_gap_between_back_and_table_is_no_lung():
    """Two thin rails join body and table; the hole between them is bounded by the body for a third of its length."""
    y, x = np.mgrid[:120, :120]
    slice_hu = np.where((y - 50) ** 2 + (x - 60) ** 2 < 30**2, 40, -1000)
    slice_hu[100:102, 25:96] = 40
    slice_hu[50:100, 33:35] = slice_hu[50:100, 85:87] = 40
    mask = body_mask(np.repeat(slice_hu[None], 4, axis=0).astype(np.int16), (5.0, 2.0, 2.0))
    assert mask[:, 50, 60].all() and not mask[:, 90, 60].any()


def test_body_of_nothing_is_empty_and_its_box_is_everything():
    hu = np.full((5, 40, 40), -1024, np.int16)
    assert not body_mask(hu, (3, 3, 3)).any()
    start, stop = mask_box(body_mask(hu, (3, 3, 3)))
    assert start.tolist() == [0, 0, 0] and stop.tolist() == [5, 40, 40]


@pytest.mark.parametrize("name", ["abdomen_pelvis_3mm", "chest_2mm", "upper_abdomen_5mm_a", "upper_abdomen_5mm_b"])
def test_body_of_real_patients(name):
    volume = read_ct(shared_file("ct", f"{name}.nii.gz"))
    mask = body_mask(volume.array, volume.spacing_mm)
    litres = mask.sum() * np.prod(volume.spacing_mm) / 1e6
    height_m = volume.shape[0] * volume.spacing_mm[0] / 1000
    assert 40 < litres / height_m < 130  # a slice of a person, in litres per metre: 0.04 to 0.13 m²
    sizes = np.bincount(ndimage.label(mask)[0].ravel())[1:]
    assert sizes.max() > 0.999 * sizes.sum()  # one object, but for specks on the skin
    # Soft tissue, which is in the middle of people and not in tables, lies inside nearly always.
    core = tuple(slice(size // 3, 2 * size // 3) for size in volume.shape)
    assert mask[core].mean() > 0.97
    outside = volume.array[~mask]
    assert np.median(outside) < -900
