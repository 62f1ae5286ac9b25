""".mha, .mhd and .nrrd files: the voxels and places of NIfTI, and errors for every kind of unusable file."""

import itertools
import os
import subprocess
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from datasets.ct.file_grid import read_file_grid, write_label_like
from datasets.ct.formats import VOLUME_SUFFIXES, files_of
from datasets.ct.images import kind_of, read_image
from datasets.ct.nifti import CTReadError, read_ct, read_label, read_label_of
from tests.itk_writer import write_itk

AFFINE = np.array([[-0.8, 0, 0, 100], [0, -0.9, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])  # LPS
ITK_SUFFIXES = tuple(suffix for suffix in VOLUME_SUFFIXES if not suffix.startswith(".nii"))


def hounsfield(shape=(6, 7, 8)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 2000, size=shape).astype(np.int16)


def affines() -> list[np.ndarray]:
    """All 48 orders and directions of the axes, each turned a little."""
    x, y, z = np.deg2rad((10, -15, 20))
    around_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    around_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    around_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    found = []
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        affine = np.eye(4)
        affine[:3, :3] = around_x @ around_y @ around_z @ (np.eye(3)[:, list(order)] * signs) * (0.8, 0.9, 2.5)
        affine[:3, 3] = (10, -20, 30)
        found.append(affine)
    return found


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_every_orientation_is_read_as_from_nifti(tmp_path, suffix):
    for affine in affines():
        nib.save(nib.Nifti1Image(hounsfield(), affine), tmp_path / "ct.nii")
        wanted, volume = (
            read_ct(tmp_path / "ct.nii"),
            read_ct(write_itk(tmp_path / f"ct{suffix}", hounsfield(), affine)),
        )
        np.testing.assert_array_equal(volume.array, wanted.array)
        np.testing.assert_allclose(volume.affine, wanted.affine, atol=1e-4)
        assert volume.array.dtype == np.int16 and volume.array.flags.c_contiguous and volume.array.flags.writeable


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_voxel_types_padding_and_compression(tmp_path, suffix, dtype, compress):
    array = np.random.default_rng(0).integers(0, 3000, (12, 13, 14)).astype(dtype)
    array[:2] = -3024 if dtype != np.uint16 else 0
    array[5, 5, 5] = 30000
    volume = read_ct(write_itk(tmp_path / f"ct{suffix}", array, AFFINE, compress))
    expected = np.clip(array.astype(np.float64), -1024, 3071).astype(np.int16).transpose(2, 1, 0)
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.9, 0.8))
    assert kind_of(volume.path) == "ct" and np.array_equal(read_image(volume.path).array, volume.array)


def test_labels_lie_on_images_of_another_format(tmp_path):
    labels = (hounsfield() > 1500).astype(np.uint8) * 13
    image = read_ct(write_itk(tmp_path / "ct.mha", hounsfield(), AFFINE))
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "label.nii.gz")
    for path in (tmp_path / "label.nii.gz", write_itk(tmp_path / "label.nrrd", labels, AFFINE)):
        np.testing.assert_array_equal(read_label_of(image, path).array, labels.transpose(2, 1, 0))
    shifted = AFFINE.copy()
    shifted[0, 3] += 30
    with pytest.raises(CTReadError, match="far.mha: label lies 30.0 mm beside its image .*ct.mha"):
        read_label_of(image, write_itk(tmp_path / "far.mha", labels, shifted))


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_predictions_are_written_on_the_files_own_grid(tmp_path, suffix):
    affine = affines()[29]
    volume = read_ct(write_itk(tmp_path / f"ct{suffix}", hounsfield(), affine))
    grid = read_file_grid(volume.path)
    assert grid.shape == (6, 7, 8) and grid.canonical()[0] == volume.shape
    np.testing.assert_allclose(grid.canonical()[1], volume.affine, atol=1e-6)
    labels = (volume.array > 1000).astype(np.uint8)
    write_label_like(tmp_path / "label.nii.gz", labels, grid)
    np.testing.assert_array_equal(read_label_of(volume, tmp_path / "label.nii.gz").array, labels)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "label.nii.gz").dataobj), hounsfield() > 1000)


def test_nan_padding_is_air(tmp_path):
    array = hounsfield((12, 12, 12)).astype(np.float32)
    array[:2] = np.nan
    assert (read_ct(write_itk(tmp_path / "ct.mha", array, AFFINE)).array[:, :, :2] == -1024).all()
    array[7, 7, 7] = np.nan
    with pytest.raises(CTReadError, match="ct.nrrd: 289 of 1728 voxels are not finite"):
        read_ct(write_itk(tmp_path / "ct.nrrd", array, AFFINE))


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def replace(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


@pytest.mark.parametrize("share", [0.99, 0.6])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_truncated_files_are_refused(tmp_path, suffix, compress, share):
    path = write_itk(tmp_path / f"ct{suffix}", hounsfield((20, 20, 20)), AFFINE, compress)
    cut(files_of(path)[-1], share)
    with pytest.raises(CTReadError, match=f"ct{suffix}: truncated"):
        read_ct(path)


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
def test_flipped_bits_in_compressed_voxels_are_refused(tmp_path, suffix):
    path = write_itk(tmp_path / f"ct{suffix}", hounsfield((20, 20, 20)), AFFINE, compress=True)
    content = bytearray(files_of(path)[-1].read_bytes())
    content[len(content) // 2] ^= 0xFF
    files_of(path)[-1].write_bytes(content)
    with pytest.raises(CTReadError, match=f"ct{suffix}: truncated"):
        read_ct(path)


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_header_that_promises_more_than_the_file_can_hold(tmp_path, suffix, compress):
    path = write_itk(tmp_path / f"ct{suffix}", hounsfield((20, 20, 20)), AFFINE, compress)
    key = b"DimSize = " if suffix == ".mha" else b"sizes: "
    replace(path, key + b"20 20 20", key + b"20000 20000 20000")
    with pytest.raises(CTReadError, match=f"ct{suffix}: truncated"):
        read_ct(path)


def test_a_compressed_stream_shorter_than_its_volume(tmp_path):
    """The stream itself is whole, but it holds half of the voxels."""
    path = write_itk(tmp_path / "ct.mhd", hounsfield((20, 20, 20)), AFFINE, compress=True)
    data = files_of(path)[1]
    data.write_bytes(zlib.compress(zlib.decompress(data.read_bytes())[:8000]))
    replace(path, b"CompressedDataSize", b"Comment")
    with pytest.raises(CTReadError, match=r"ct.mhd: truncated; its voxels need 16000 bytes, ct.zraw holds 8000"):
        read_ct(path)


@pytest.mark.parametrize(
    ("suffix", "old", "new", "reason"),
    [
        (".mha", b"NDims = 3", b"NDims = 4", "expected one 3-D volume|truncated"),
        (".mha", b"ElementDataFile = LOCAL", b"ElementDataFile = /nowhere/x.raw", "/nowhere/x.raw, where its voxels"),
        (".mha", b"ElementDataFile = LOCAL", b"ElementDataFile = LIST", "lists of files are not read"),
        (".mha", b"ElementDataFile = LOCAL", b"ElementDataPath = LOCAL", "not a MetaImage file"),
        (".mha", b"BinaryData = True", b"BinaryData = False", "voxels are written as text"),
        (".mha", b"1 0 0 0 1 0 0 0 1", b"1 0 0 1 0 0 0 0 1", "ct.mha"),
        (".mha", b"ElementSpacing = 1 ", b"ElementSpacing = nan ", "ct.mha"),
        (".nrrd", b"endian: little\n", b"data file: -\n", "its voxels lie elsewhere .data file: -"),
        (".nrrd", b"dimension: 3", b"dimension: 9", "truncated, damaged or not of its format"),
    ],
)
def test_damaged_headers(tmp_path, suffix, old, new, reason):
    path = write_itk(tmp_path / f"ct{suffix}", hounsfield(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    replace(path, old, new)
    with pytest.raises(CTReadError, match=reason) as caught:
        read_ct(path)
    assert f"ct{suffix}" in str(caught.value)


@pytest.mark.parametrize("suffix", ITK_SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"<html>404</html>\n" * 40, os.urandom(3000)])
def test_other_content_under_these_names(tmp_path, suffix, content):
    path = tmp_path / f"ct{suffix}"
    path.write_bytes(content)
    with pytest.raises(CTReadError, match=f"ct{suffix}: "):
        read_label(path)


def test_shapes_and_channels_that_are_no_volume(tmp_path):
    for array, is_vector, reason in (
        (np.zeros((4, 5, 6, 2), np.int16), True, "2 values a voxel, expected one channel"),
        (np.zeros((2, 3, 4, 5), np.int16), False, "is 4-D, expected one 3-D volume"),
        (np.zeros((4, 5), np.int16), False, "is 2-D"),
        (np.ones((3, 4, 5), np.complex64), False, "(is not a real number|2 values a voxel)"),
    ):
        for suffix in (".mha", ".nrrd"):
            image = SimpleITK.GetImageFromArray(array, isVector=is_vector)
            SimpleITK.WriteImage(image, str(tmp_path / f"ct{suffix}"))
            with pytest.raises(CTReadError, match=f"ct{suffix}: .*{reason}"):
                read_ct(tmp_path / f"ct{suffix}")


def test_a_trailing_axis_of_one_is_dropped(tmp_path):
    array = hounsfield()
    for suffix in (".mha", ".nrrd"):
        image = SimpleITK.GetImageFromArray(array.T[None], isVector=False)
        SimpleITK.WriteImage(image, str(tmp_path / f"ct{suffix}"))
        np.testing.assert_array_equal(read_ct(tmp_path / f"ct{suffix}").array, array.T)


def test_what_is_missing_or_no_regular_file(tmp_path):
    (tmp_path / "folder.mha").mkdir()
    os.mkfifo(tmp_path / "pipe.nrrd")  # opening it would wait for ever
    for name, reason in (
        ("none.mha", "no such file"),
        ("none.mhd", "no such file"),
        ("folder.mha", "no regular file"),
        ("pipe.nrrd", "no regular file"),
        ("scan.dcm", r"expected .nii, .nii.gz, .mha, .mhd, .nrrd, or a folder .*there is no such file"),
    ):
        with pytest.raises(CTReadError, match=f"{name}: .*{reason}"):
            read_ct(tmp_path / name)


def test_simpleitk_is_imported_only_for_its_files(tmp_path):
    nib.save(nib.Nifti1Image(hounsfield(), AFFINE), tmp_path / "ct.nii")
    code = (
        "import sys; from datasets.ct.nifti import read_ct; import datasets.lists.data_list, datasets.store.volumes\n"
        f"read_ct({str(tmp_path / 'ct.nii')!r}); assert 'SimpleITK' not in sys.modules\n"
        f"read_ct({str(write_itk(tmp_path / 'ct.mha', hounsfield(), AFFINE))!r}); assert 'SimpleITK' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
