"""Reading CT and labels: values, orientation, and errors for every kind of unusable file."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from datasets.ct.geometry import index_to_world, world_to_index
from datasets.ct.nifti import CTReadError, read_ct, read_label, read_label_of, write_nifti
from tests.shared import shared_file

AFFINE = np.array([[-0.8, 0, 0, 100], [0, -0.9, 0, 120], [0, 0, 2.5, -300], [0, 0, 0, 1.0]])  # LPS


def hounsfield(shape=(6, 7, 8)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 2000, size=shape).astype(np.int16)


def save(path, array, affine=AFFINE, slope=None, inter=None, kind=nib.Nifti1Image):
    image = kind(array, affine)
    image.header.set_slope_inter(slope, inter)
    nib.save(image, path)
    return path


def patch_header(path, kind=nib.Nifti1Header, **fields):
    """Overwrite header fields in an uncompressed file, past nibabel's own checks."""
    content = bytearray(path.read_bytes())
    header = kind(bytes(content[: kind.template_dtype.itemsize]), check=False)
    for key, value in fields.items():
        header[key] = value
    content[: kind.template_dtype.itemsize] = header.binaryblock
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_voxel_type_gives_the_same_int16(tmp_path, dtype, suffix):
    image = nib.Nifti1Image(hounsfield().astype(dtype), AFFINE, dtype=dtype)
    nib.save(image, tmp_path / f"ct{suffix}")
    volume = read_ct(tmp_path / f"ct{suffix}")
    assert volume.array.dtype == np.int16 and volume.shape == (8, 7, 6)
    assert np.array_equal(volume.array, hounsfield().transpose(2, 1, 0))
    assert np.allclose(volume.spacing_mm, (2.5, 0.9, 0.8))
    assert volume.array.flags.c_contiguous and volume.array.flags.writeable


def test_big_endian_and_nifti2(tmp_path):
    nib.save(nib.Nifti1Image(hounsfield(), AFFINE, nib.Nifti1Header(endianness=">")), tmp_path / "big.nii")
    save(tmp_path / "two.nii.gz", hounsfield(), kind=nib.Nifti2Image)
    for name in ("big.nii", "two.nii.gz"):
        assert np.array_equal(read_ct(tmp_path / name).array, hounsfield().transpose(2, 1, 0))


def test_slope_and_intercept(tmp_path):
    stored = (hounsfield().astype(np.int32) + 1024).astype(np.uint16)
    image = nib.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(1, 0)
    nib.save(image, tmp_path / "ct.nii")
    for slope, inter in ((1, -1024), (0.5, -1024), (1.25, -1000.25)):
        patch_header(tmp_path / "ct.nii", scl_slope=slope, scl_inter=inter)
        expected = np.rint(np.clip(np.asarray(nib.load(tmp_path / "ct.nii").dataobj), -1024, 3071)).transpose(2, 1, 0)
        assert np.array_equal(read_ct(tmp_path / "ct.nii").array, expected)


def test_padding_and_metal_are_clamped(tmp_path):
    array = hounsfield().astype(np.int32)
    array[0, 0, 0], array[1, 0, 0], array[2, 0, 0] = -3024, 30000, 70000
    volume = read_ct(save(tmp_path / "ct.nii.gz", array))
    assert volume.array[0, 0, :3].tolist() == [-1024, 3071, 3071]


def test_unsigned_values_above_int16_do_not_wrap(tmp_path):
    array = np.full((10, 10, 10), 40, np.uint16)
    array[0, 0, :9] = 65000
    assert read_ct(save(tmp_path / "ct.nii", array)).array.max() == 3071


def test_trailing_axes_of_one_are_dropped(tmp_path):
    for shape in ((6, 7, 8, 1), (6, 7, 8, 1, 1)):
        volume = read_ct(save(tmp_path / "ct.nii.gz", hounsfield().reshape(shape)))
        assert np.array_equal(volume.array, hounsfield().transpose(2, 1, 0))


def test_gzip_is_recognised_whatever_the_name(tmp_path):
    save(tmp_path / "a.nii", hounsfield())
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii").read_bytes())
    (tmp_path / "c.nii").write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    for name in ("b.nii.gz", "c.nii"):
        assert np.array_equal(read_ct(tmp_path / name).array, hounsfield().transpose(2, 1, 0))


def test_oblique_affine_is_kept(tmp_path):
    angle = np.deg2rad(25)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = AFFINE.copy()
    affine[:3, :3] = turn @ AFFINE[:3, :3]
    volume = read_ct(save(tmp_path / "ct.nii.gz", hounsfield(), affine))
    place = index_to_world(affine, (4, 5, 1))
    index = world_to_index(volume.affine, place)
    assert np.allclose(index, np.rint(index), atol=1e-4)
    assert volume.array[tuple(np.rint(index).astype(int))] == hounsfield()[4, 5, 1]


def test_metres_and_microns_become_millimetres(tmp_path):
    wanted = read_ct(save(tmp_path / "ct.nii", hounsfield()))
    for unit, factor in (("meter", 1e-3), ("micron", 1e3), ("mm", 1.0), ("unknown", 1.0)):
        affine = AFFINE.copy()
        affine[:3] *= factor
        image = nib.Nifti1Image(hounsfield(), affine)
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / "other.nii")
        np.testing.assert_allclose(read_ct(tmp_path / "other.nii").affine, wanted.affine, rtol=1e-5)


@pytest.mark.parametrize(
    ("factors", "reason"),
    [
        ((1, 1, 400), "voxels of"),
        ((1e-3, 1e-3, 1e-3), "voxels of"),
        ((0.2, 0.2, 0.1), "longest side of"),
        ((1, 0.01, 1), "voxels"),
    ],
)
def test_sizes_that_no_patient_has_are_refused(tmp_path, factors, reason):
    path = save(tmp_path / "ct.nii", hounsfield(), AFFINE @ np.diag([*factors, 1.0]))
    with pytest.raises(CTReadError, match=f"ct.nii: .*{reason}.*are the header's units right"):
        read_ct(path)


def test_headers_that_readers_understand_differently_are_noted(tmp_path, caplog):
    read_ct(save(tmp_path / "fine.nii", hounsfield()))
    assert not caplog.text
    image = nib.Nifti1Image(hounsfield(), AFFINE)
    shifted = AFFINE.copy()
    shifted[:3, 3] += 30
    image.set_qform(shifted, code=1)
    nib.save(image, tmp_path / "both.nii")
    read_ct(tmp_path / "both.nii")
    assert "both.nii: sform and qform differ by up to 52 mm; the sform counts" in caplog.text
    caplog.clear()
    read_ct(
        patch_header(save(tmp_path / "pixdim.nii", hounsfield()), pixdim=[1, 3, 0.9, 2.5, 1, 1, 1, 1], qform_code=0)
    )
    assert "pixdim.nii: pixdim says voxels of 3, 0.9, 2.5 mm, the affine" in caplog.text


def test_a_tilted_gantry_is_noted(tmp_path, caplog):
    sheared = AFFINE.copy()
    sheared[1, 2] = np.tan(np.deg2rad(20)) * AFFINE[2, 2]
    image = nib.Nifti1Image(hounsfield(), sheared)
    image.set_qform(None, code=0)
    nib.save(image, tmp_path / "ct.nii")
    read_ct(tmp_path / "ct.nii")
    assert "ct.nii: its axes are sheared by 20 degrees (a tilted gantry)" in caplog.text


def test_nan_padding_is_air_and_noted(tmp_path, caplog):
    array = hounsfield((12, 12, 12)).astype(np.float32)
    padded = array.copy()
    padded[:2], padded[4:6, 9:, 0] = np.nan, np.nan
    volume = read_ct(save(tmp_path / "padded.nii", padded))
    wanted = np.where(np.isnan(padded), -1024, array)
    plain = read_ct(save(tmp_path / "plain.nii", wanted.astype(np.int16)))
    np.testing.assert_array_equal(volume.array, plain.array)
    assert "padded.nii: 17.0 % of voxels are NaN, all at the border; read as air" in caplog.text
    padded[7, 7, 7] = np.nan
    with pytest.raises(CTReadError, match="are not finite"):
        read_ct(save(tmp_path / "damaged.nii", padded))
    with pytest.raises(CTReadError, match="are not finite"):
        read_ct(save(tmp_path / "nothing.nii", np.full((12, 12, 12), np.nan, np.float32)))


def test_mr_of_twelve_bits_is_refused(tmp_path):
    """0 to 4095, the common range of MR: a few percent lie above the largest HU."""
    mr = np.random.default_rng(0).integers(0, 4096, (12, 12, 12)).astype(np.uint16)
    with pytest.raises(CTReadError, match="of voxels lie above 3071"):
        read_ct(save(tmp_path / "mr.nii", mr))


def test_scaled_wide_integers_keep_every_bit(tmp_path):
    """Odd numbers above 2^24 are no float32."""
    hu = hounsfield()
    raw = hu.astype(np.int32) + 2**26
    image = nib.Nifti1Image(raw, AFFINE)
    image.header.set_slope_inter(1.0, -(2.0**26))
    nib.save(image, tmp_path / "wide.nii")
    patch_header(tmp_path / "wide.nii", scl_slope=1.0, scl_inter=-(2.0**26))
    np.testing.assert_array_equal(read_ct(tmp_path / "wide.nii").array, read_ct(save(tmp_path / "hu.nii", hu)).array)


@pytest.mark.parametrize(("voxels", "is_right"), [(0.4, True), (0.6, False), (3.0, False)])
@pytest.mark.parametrize("axis", range(3))
def test_labels_lie_on_their_image_to_half_a_voxel(tmp_path, axis, voxels, is_right):
    isotropic = np.diag([-2.0, -2.0, 2.0, 1.0])
    image = read_ct(save(tmp_path / "ct.nii", hounsfield(), isotropic))
    shifted = isotropic.copy()
    shifted[axis, 3] += 2 * voxels
    path = save(tmp_path / "label.nii", np.zeros((6, 7, 8), np.uint8), shifted)
    if is_right:
        assert read_label_of(image, path).shape == image.shape
    else:
        with pytest.raises(CTReadError, match=f"label lies {2 * voxels:.1f} mm beside its image"):
            read_label_of(image, path)


def test_qform_is_used_where_there_is_no_sform(tmp_path):
    image = nib.Nifti1Image(hounsfield(), AFFINE)
    image.set_sform(None, code=0)
    image.set_qform(AFFINE, code=1)
    nib.save(image, tmp_path / "ct.nii.gz")
    assert np.allclose(read_ct(tmp_path / "ct.nii.gz").affine[:, [2, 1, 0, 3]], AFFINE, atol=1e-4)


def broken_truncated_gzip(path):
    save(path, hounsfield((40, 40, 40)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken_truncated_plain(path):
    plain = save(path.with_name("plain.nii"), hounsfield())
    path.write_bytes(gzip.compress(plain.read_bytes()[:-10]))


def broken_flipped_bits(path):
    save(path, hounsfield((40, 40, 40)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def broken_text(path):
    path.write_text("<html>404: not found</html>" * 40)


def broken_bytes(path):
    path.write_bytes(b"")


def broken_gzip_of_nothing(path):
    path.write_bytes(gzip.compress(b""))


def broken_four_axes(path):
    save(path, hounsfield((4, 4, 4, 3)))


def broken_two_axes(path):
    save(path, hounsfield((4, 4)))


def broken_colour(path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), AFFINE), path)


def broken_complex(path):
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.complex64), AFFINE), path)


def broken_constant(path):
    save(path, np.full((4, 4, 4), -1000, np.int16))


def broken_only_padding(path):
    array = np.full((4, 4, 4), -3024, np.int16)
    array[0] = -2000
    save(path, array)


def broken_scaled(path):
    save(path, np.random.default_rng(0).random((6, 7, 8)).astype(np.float32))


def broken_units(path):
    save(path, np.random.default_rng(0).integers(0, 9000, (6, 7, 8)).astype(np.uint16))


def broken_nan(path):
    array = hounsfield().astype(np.float32)
    array[1, 2, 3] = np.nan
    save(path, array)


def broken_infinite(path):
    array = hounsfield().astype(np.float32)
    array[1, 2, 3], array[1, 2, 4] = -np.inf, np.inf
    save(path, array)


def _patched(path, **fields):
    plain = patch_header(save(path.with_name("plain.nii"), hounsfield()), **fields)
    path.write_bytes(gzip.compress(plain.read_bytes()))


def broken_no_voxels(path):
    _patched(path, dim=[3, 6, 0, 8, 1, 1, 1, 1])


def broken_huge(path):
    _patched(path, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])


def broken_zero_spacing(path):
    _patched(path, pixdim=[1, 0, 0.9, 2.5, 1, 1, 1, 1])


def broken_zero_spacing_without_sform(path):
    _patched(path, pixdim=[1, 0.8, 0.9, 0, 1, 1, 1, 1], sform_code=0, qform_code=0)


def broken_nan_spacing(path):
    _patched(path, pixdim=[1, np.nan, 0.9, 2.5, 1, 1, 1, 1])


def broken_zero_column(path):
    _patched(path, srow_x=[0, 0, 0, 100], srow_y=[0, -0.9, 0, 120], srow_z=[0, 0, 2.5, -300])


def broken_parallel_axes(path):
    _patched(path, srow_x=[-0.8, -0.8, 0, 100], srow_y=[0.1, 0.1, 0, 120], srow_z=[0, 0, 2.5, -300])


def broken_nan_affine(path):
    _patched(path, srow_x=[np.nan, 0, 0, 100])


def broken_quaternion(path):
    _patched(path, sform_code=0, qform_code=1, quatern_b=3.0, quatern_c=3.0)


def broken_nan_offset(path):
    _patched(path, vox_offset=np.nan)


def broken_infinite_offset(path):
    _patched(path, vox_offset=np.inf)


def broken_negative_offset(path):
    _patched(path, vox_offset=-352)


def broken_freesurfer_shape(path):
    _patched(path, dim=[3, -1, 1, 1, 1, 1, 1, 1])


def broken_voxel_type(path):
    _patched(path, datatype=999)


@pytest.mark.parametrize(
    "breaker, reason",
    [
        (broken_truncated_gzip, "truncated"),
        (broken_truncated_plain, r"truncated; shape \(6, 7, 8\) of int16 needs \d+ bytes, received \d+"),
        (broken_flipped_bits, "damaged gzip"),
        (broken_text, "not a NIfTI file"),
        (broken_bytes, "empty"),
        (broken_gzip_of_nothing, "empty"),
        (broken_four_axes, r"shape \(4, 4, 4, 3\) is 4-D, expected one 3-D volume"),
        (broken_two_axes, "2-D"),
        (broken_colour, "voxel type"),
        (broken_complex, "voxel type"),
        (broken_constant, "every voxel is -1000"),
        (broken_only_padding, "outside of -1024 to 3071 HU"),
        (broken_scaled, r"no CT in HU \(scaled to \[0, 1\]\?\)"),
        (broken_units, r"6\d% of voxels lie above 3071 \(up to 89\d\d\)"),
        (broken_nan, "1 of 336 voxels are not finite"),
        (broken_infinite, "2 of 336 voxels are not finite"),
        (broken_no_voxels, "no voxels"),
        (broken_huge, "truncated"),
        (broken_zero_spacing, "spacing"),
        (broken_zero_spacing_without_sform, "spacing"),
        (broken_nan_spacing, "spacing"),
        (broken_zero_column, "spacing of zero"),
        (broken_parallel_axes, "singular affine"),
        (broken_nan_affine, "not finite"),
        (broken_quaternion, "orientation"),
        (broken_nan_offset, "damaged NIfTI header"),
        (broken_infinite_offset, "damaged NIfTI header"),
        (broken_negative_offset, "vox_offset is -352"),
        (broken_freesurfer_shape, "damaged NIfTI header"),
        (broken_voxel_type, "unknown voxel type code 999"),
    ],
)
def test_unusable_files_are_named_with_the_reason(tmp_path, breaker, reason):
    path = tmp_path / "patient_7.nii.gz"
    breaker(path)
    for read in (read_ct, read_label):
        if read is read_label and breaker in (broken_constant, broken_only_padding, broken_scaled, broken_units):
            continue  # constant maps and high labels are fine; negative and broken ones have their own tests
        with pytest.raises(CTReadError, match=reason) as caught:
            read(path)
        assert "patient_7.nii.gz" in str(caught.value)


def test_missing_file_folder_and_foreign_suffix(tmp_path):
    (tmp_path / "folder.nii").mkdir()
    for name, reason in (("none.nii.gz", "no such file"), ("folder.nii", "cannot be read"), ("scan.dcm", "expected")):
        with pytest.raises(CTReadError, match=reason) as caught:
            read_ct(tmp_path / name)
        assert name in str(caught.value)


def test_labels_keep_their_values(tmp_path):
    labels = np.zeros((6, 7, 8), np.uint8)
    labels[1:3] = 13
    for dtype in (np.uint8, np.int16, np.float32, np.int32):
        volume = read_label(save(tmp_path / "label.nii.gz", labels.astype(dtype)))
        assert volume.array.dtype == np.uint8
        assert np.array_equal(volume.array, labels.transpose(2, 1, 0))
    labels = labels.astype(np.int16)
    labels[0] = 1000
    assert read_label(save(tmp_path / "label.nii.gz", labels)).array.dtype == np.int16
    assert not read_label(save(tmp_path / "zeros.nii.gz", np.zeros((4, 4, 4), np.uint8))).array.any()


@pytest.mark.parametrize("value, reason", [(-1, "-1"), (40000, "40000"), (0.5, "whole numbers")])
def test_what_is_no_label_is_refused(tmp_path, value, reason):
    array = np.ones((4, 4, 4), np.float32)
    array[0, 0, 0] = value
    with pytest.raises(CTReadError, match=reason):
        read_label(save(tmp_path / "label.nii.gz", array))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_written_files_come_back_in_place(tmp_path, suffix):
    volume = read_ct(save(tmp_path / "ct.nii.gz", hounsfield()))
    path = tmp_path / f"again{suffix}"
    write_nifti(path, volume.array, volume.affine)
    again = read_ct(path)
    assert np.array_equal(again.array, volume.array) and np.allclose(again.affine, volume.affine, atol=1e-4)
    other = nib.load(path)
    assert nib.aff2axcodes(other.affine) == ("L", "P", "S")
    place = index_to_world(volume.affine, (2, 3, 4))
    index = np.rint(world_to_index(other.affine, place)).astype(int)
    assert np.asarray(other.dataobj)[tuple(index)] == volume.array[2, 3, 4]
    assert [file.name for file in tmp_path.iterdir() if "aside" in file.name] == []


def test_writing_masks_and_wide_integers(tmp_path):
    mask = np.zeros((3, 4, 5), bool)
    mask[1] = True
    for array in (mask, mask.astype(np.int64)):
        write_nifti(tmp_path / "mask.nii.gz", array, np.eye(4)[[2, 1, 0, 3]])
        assert np.array_equal(np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj), mask.transpose(2, 1, 0))
    with pytest.raises(ValueError, match="\\.nii"):
        write_nifti(tmp_path / "mask.png", mask, np.eye(4))
    with pytest.raises(ValueError, match="shape"):
        write_nifti(tmp_path / "mask.nii", mask[0], np.eye(4))


@pytest.mark.parametrize(
    "name, shape, spacing_mm",
    [
        ("abdomen_pelvis_3mm", (112, 101, 122), (3, 3, 3)),
        ("chest_2mm", (201, 250, 250), (2, 2, 2)),
        ("upper_abdomen_5mm_a", (41, 512, 512), (5, 0.797, 0.797)),
        ("upper_abdomen_5mm_b", (51, 512, 512), (5, 0.805, 0.805)),
    ],
)
def test_real_ct(name, shape, spacing_mm):
    path = shared_file("ct", f"{name}.nii.gz")
    volume = read_ct(path)
    assert volume.shape == shape and np.allclose(volume.spacing_mm, spacing_mm, atol=1e-3)
    assert volume.array.min() == -1024 and 800 < volume.array.max() <= 3071
    # The middle of a torso is mostly soft tissue; its back (high index in H) has the spine.
    middle = volume.array[tuple(slice(2 * size // 5, 3 * size // 5) for size in shape)]
    assert -100 < np.median(middle[middle > -200]) < 150
    original = np.clip(np.asarray(nib.load(path).dataobj), -1024, 3071)
    place = index_to_world(nib.load(path).affine, (50, 60, 20))
    index = np.rint(world_to_index(volume.affine, place)).astype(int)
    assert volume.array[tuple(index)] == original[50, 60, 20]


def test_real_anatomy_is_on_its_side():
    lungs = read_label(shared_file("ct", "chest_2mm_label.nii.gz"))
    left, right, cord = (np.argwhere(lungs.array == value).mean(axis=0) for value in (2, 3, 1))
    assert left[2] > right[2]  # W grows to the patient's left
    assert cord[1] > left[1]  # H grows to the back
    ct = read_ct(shared_file("ct", "chest_2mm.nii.gz"))
    assert np.median(ct.array[lungs.array == 2]) < -700 and np.median(ct.array[lungs.array == 1]) > 0
    assert np.mean(ct.array[150:] < -900) > np.mean(ct.array[:50] < -900)  # D grows to the head: shoulders, air around
