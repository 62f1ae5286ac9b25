"""Bad images: CT in NIfTI files and radiographs in PNG files, given to create_json.py and prepare_volumes.py."""

import gzip
import io
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from benchmarks.fault_kinds.attempt import DAMAGES, Attempt, Faults, Good, with_flipped_bit
from benchmarks.results import words
from datasets.ct.geometry import index_to_world
from datasets.ct.nifti import HU_MAX, HU_MIN, Volume
from datasets.lists.data_list import Case, write_data_list
from datasets.store.volumes import VolumeStore

Change = Callable[[bytes, random.Random], bytes]  # content of a good file (CT: not compressed) -> of a bad one
NUM_PLACES = 200
MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}


def changed_header(**fields: object) -> Change:
    """Other values in the header; an index stands behind two underscores, as in `pixdim__1`."""

    def change(content: bytes, rng: random.Random) -> bytes:
        header = nib.Nifti1Header.from_fileobj(io.BytesIO(content), check=False)
        for name, values in fields.items():
            field, _, index = name.partition("__")
            value = rng.choice(values)
            if index:
                header[field][int(index)] = value
            else:
                header[field] = value
        return header.binaryblock + content[len(header.binaryblock) :]

    return change


def changed_voxels(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Other voxels, with a header to match."""

    def changed(content: bytes, rng: random.Random) -> bytes:
        image = nib.Nifti1Image.from_bytes(content)
        return nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine).to_bytes()

    return changed


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.astype(np.float32)
    array[tuple(size // 2 for size in array.shape)] = np.nan
    return array


ROWS = ("srow_x", "srow_y", "srow_z")
NOT_LENGTHS = (0.0, float("nan"), float("inf"))
CT_CHANGES: dict[str, Change] = {
    "a bit of the header": lambda content, rng: with_flipped_bit(content, rng, 0, 352),
    "a bit of the geometry": lambda content, rng: with_flipped_bit(content, rng, 40, 328),
    "not all voxels": lambda content, rng: content[: rng.randrange(352, len(content))],
    "wrong sizes": changed_header(dim__1=(0, -5, 1, 21, 32767), dim__2=(0, -1, 3, 31, 64)),
    "other number of axes": changed_header(dim__0=(0, 1, 2, 4, 5, 7, 8, -1)),
    "affine not finite": changed_header(
        **{f"{row}__{at}": (float("nan"), float("inf")) for row, at in zip(ROWS, "013")}
    ),
    "singular affine": changed_header(srow_x__0=(0.0,), srow_x__1=(0.0,), srow_x__2=(0.0,)),
    "no spacing": changed_header(pixdim__1=NOT_LENGTHS, pixdim__3=NOT_LENGTHS),
    "absurd spacing": changed_header(srow_x__0=(1e-6, 1e4), srow_y__1=(1e-6, 1e4), srow_z__2=(1e-6, 1e4)),
    "unknown voxel type": changed_header(datatype=(0, 1, 3, 99, 32, 128, 1792, 2048, -4)),
    "wrong voxel type": changed_header(datatype=(2, 8, 16, 64, 512, 1024)),
    "scaled absurdly": changed_header(
        scl_slope=(float("nan"), 1e30, -1e30, float("inf")), scl_inter=(0.0, float("nan"), 1e30)
    ),
    "voxels far away": changed_header(vox_offset=(1e9, -1.0, float("nan"), 1e30, 0.0)),
    "other magic": changed_header(magic=(b"ni1", b"abc", b"", b"n+3")),
    "NaN in the body": changed_voxels(with_nan),
    "one value": changed_voxels(np.zeros_like),
    "scaled to one": changed_voxels(lambda array: ((array + 1000) / 1200).astype(np.float32)),
    "two time points": changed_voxels(lambda array: np.stack([array, array], axis=-1)),
    "one slice": changed_voxels(lambda array: array[:, :, 0]),
    "large values": changed_voxels(lambda array: array.astype(np.int32) * 1000),
    "complex": changed_voxels(lambda array: array.astype(np.complex64)),
}


def ct_fault(change: Change, before_gzip: bool) -> Callable[[Good, Path, random.Random], Attempt]:
    """A CT file with something wrong in what is compressed, or in the compressed file."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        source = good.folder / "small/small0.nii.gz"
        if before_gzip:
            content = change(gzip.decompress(source.read_bytes()), rng)
            name = rng.choice(("bad.nii", "bad.nii.gz"))
            content = gzip.compress(content) if name.endswith(".gz") else content
        else:
            content, name = change(source.read_bytes(), rng), "bad.nii.gz"
        return image_attempt(good, folder, rng, name, content, reads_like_nibabel)

    return make


def image_attempt(
    good: Good,
    folder: Path,
    rng: random.Random,
    name: str,
    content: bytes | None,
    is_right: Callable[[Path, Volume], bool],
) -> Attempt:
    """One of the two commands that read images, given a bad one; `content` None: a folder of that name."""
    data_dir, bad = folder / "data", folder / "data" / name
    data_dir.mkdir()
    if content is None:
        bad.mkdir()
    else:
        bad.write_bytes(content)
    if rng.random() < 0.5:
        write_data_list(folder / "list.json", data_dir, [Case("bad", bad)])
        given = good.storing_words(folder / "store", data_dir, folder / "list.json")
        is_stored_right = lambda printed: is_right(bad, VolumeStore(folder / "store").read("bad"))  # noqa: E731
        return Attempt("scripts.prepare_volumes", given, (name,), is_stored_right)
    suffix = ".png" if name.endswith(".png") else ".nii.gz"
    where = "radiographs/chest1" if suffix == ".png" else "small/small1"
    shutil.copy(good.folder / f"{where}{suffix}", data_dir / f"good{suffix}")

    def is_listed_right(printed: str) -> bool:
        listed = json.loads((folder / "list.json").read_text())
        if not any(entry["image"] == name for entry in listed["training"]):
            return name in printed or content is None  # a folder is no image
        return is_right(bad, read_any(bad))

    given = words(data_dir=data_dir, output=folder / "list.json", num_workers=1)
    return Attempt("scripts.create_json", given, (name, str(data_dir)), is_listed_right)


def read_any(path: Path) -> Volume:
    """As prepare_volumes.py reads it."""
    from datasets.ct.images import read_image

    return read_image(path)


def reads_like_nibabel(path: Path, volume: Volume) -> bool:
    """Whether nibabel finds the same HU at the same places in the world."""
    try:
        image = nib.load(path)
        data, affine = image.get_fdata(), np.array(image.affine)
    except Exception:  # a header that nibabel refuses: then only the good file's content is right
        return False
    affine[:3] *= MM_PER_UNIT.get(image.header.get_xyzt_units()[0], 1.0)
    data = data.reshape([size for number, size in enumerate(data.shape) if number < 3 or size > 1])
    if data.ndim != 3 or sorted(data.shape) != sorted(volume.shape) or not np.isfinite(data).all():
        return False
    rng = np.random.default_rng(0)
    index = rng.integers(0, volume.shape, (NUM_PLACES, 3))
    there = index_to_world(np.linalg.inv(affine), index_to_world(volume.affine, index))
    nearest = np.rint(there).astype(int)
    if np.abs(there - nearest).max() > 0.01:
        return False
    expected = np.clip(data[tuple(nearest.T)], HU_MIN, HU_MAX)
    return bool(np.abs(expected - volume.array[tuple(index.T)]).max() <= 0.51)


def png_chunk_changed(kind: bytes, first: int, values: tuple[int, ...]) -> Change:
    """Another byte in a chunk of a PNG file, with its checksum made anew."""

    def change(content: bytes, rng: random.Random) -> bytes:
        import zlib

        at = content.index(kind)
        length = struct.unpack(">I", content[at - 4 : at])[0]
        data = bytearray(content[at + 4 : at + 4 + length])
        data[first] = rng.choice(values)
        checked = struct.pack(">I", zlib.crc32(kind + bytes(data)))
        return content[: at + 4] + bytes(data) + checked + content[at + 8 + length :]

    return change


def repainted(**made: object) -> Change:
    """The picture in another mode."""

    def change(content: bytes, rng: random.Random) -> bytes:
        pixels = np.asarray(Image.open(io.BytesIO(content))) >> 4
        grey = pixels.astype(np.uint8)
        pictures = {
            "palette": lambda: Image.fromarray(grey).convert("P"),
            "colour": lambda: Image.fromarray(np.stack([grey, grey[::-1], grey], -1)),
            "transparent": lambda: Image.fromarray(np.stack([grey, grey], -1), "LA"),
            "black and white": lambda: Image.fromarray(grey > 100),
            "one value": lambda: Image.fromarray(np.full_like(grey, 7)),
            "label map": lambda: Image.fromarray((grey > 100).astype(np.uint8)),
        }
        buffer = io.BytesIO()
        pictures[made["into"]]().save(buffer, format=made.get("format", "PNG"))
        return buffer.getvalue()

    return change


RADIOGRAPH_CHANGES: dict[str, Change] = {
    "wrong size": png_chunk_changed(b"IHDR", 3, (0, 1, 41, 255)),
    "wrong depth": png_chunk_changed(b"IHDR", 8, (0, 1, 3, 4, 8, 32)),
    "wrong colours": png_chunk_changed(b"IHDR", 9, (1, 2, 3, 4, 5, 6, 99)),
    "giant": png_chunk_changed(b"IHDR", 0, (1, 127, 255)),
    **{into: repainted(into=into) for into in ("palette", "colour", "transparent", "black and white", "one value")},
    "label map": repainted(into="label map"),
    "a GIF": repainted(into="palette", format="GIF"),
}


def radiograph_fault(change: Change) -> Callable[[Good, Path, random.Random], Attempt]:
    """A PNG file with something wrong."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        content = change((good.folder / "radiographs/chest0.png").read_bytes(), rng)
        return image_attempt(good, folder, rng, "bad.png", content, reads_like_pillow)

    return make


def reads_like_pillow(path: Path, volume: Volume) -> bool:
    """Whether Pillow finds the same grey, up to the offset of a radiograph's storage."""
    try:
        pixels = np.asarray(Image.open(path)).astype(np.int64)
    except Exception:
        return False
    array = volume.array[0].astype(np.int64)
    return pixels.shape == array.shape and len(np.unique(pixels - array)) == 1


def folder_in_its_place(name: str) -> Callable[[Good, Path, random.Random], Attempt]:
    """A folder that is called like an image."""
    return lambda good, folder, rng: image_attempt(good, folder, rng, name, None, lambda path, volume: False)


CT_FAULTS: Faults = {
    **{name: ct_fault(change, before_gzip=True) for name, change in CT_CHANGES.items()},
    **{f"compressed: {name}": ct_fault(change, before_gzip=False) for name, change in DAMAGES.items()},
    "compressed: cut off near its end": ct_fault(lambda content, rng: content[: -rng.randrange(1, 12)], False),
    "compressed: garbage behind": ct_fault(lambda content, rng: content + rng.randbytes(100), False),
    "a folder": folder_in_its_place("bad.nii.gz"),
}
RADIOGRAPH_FAULTS: Faults = {
    **{name: radiograph_fault(change) for name, change in (DAMAGES | RADIOGRAPH_CHANGES).items()},
    "cut off near its end": radiograph_fault(lambda content, rng: content[: -rng.randrange(1, 30)]),
    "a folder": folder_in_its_place("bad.png"),
}
