"""Radiographs for tests: PNG files written by hand, and small phantoms."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.ct.radiograph import PNG_SIGNATURE
from datasets.lists.data_list import write_data_list
from datasets.phantom.radiographs import list_radiographs, radiograph_files, write_radiograph


def picture(shape=(40, 48), seed: int = 0, dtype=np.uint8) -> np.ndarray:
    """Random grey that holds 0 and the type's largest value."""
    grey = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    grey.flat[:2] = 0, np.iinfo(dtype).max
    return grey


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    """Write pixels as Pillow does, without a pixel size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def raw_png(width: int, height: int, bits: int, colour: int, row_bytes: int) -> bytes:
    """A PNG of zeros of any kind, also those that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + row_bytes)))
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def small_phantoms(out_dir: Path, num_unlabelled: int = 2, num_labelled: int = 2, coarsen: float = 3.0) -> Path:
    """Coarse phantom radiographs and their data list, whose last labelled case is held out; returns the list."""
    listed = []
    for case in list_radiographs(num_unlabelled, num_labelled, seed=3):
        case = replace(case, coarsen=coarsen)
        write_radiograph(out_dir, case)
        listed.append(radiograph_files(out_dir, case))
    write_data_list(out_dir / "xray.json", out_dir, listed[:-1], listed[-1:], {"0": "background", "14": "lungs"})
    return out_dir / "xray.json"
