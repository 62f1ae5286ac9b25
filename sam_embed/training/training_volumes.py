"""The volumes that SAM trains on, on its grid: made once, kept on disk, mapped into memory by every process.

One file per case, `<grid_dir>/<case>.safetensors`: the body's box in int16 HU, its mask in bits, and a header with
the grid and the CT it was made from. Ranks share the making; the pages that they read are shared too, so that a
corpus larger than memory serves any number of ranks and loading processes.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from datasets.ct.nifti import Volume
from datasets.store.files import FileWriteError, write_bytes
from datasets.store.volumes import VolumeStore
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.preprocess import cut_body
from sam_embed.training.views import TrainingVolume

SUFFIX = ".safetensors"
FORMAT = "sam_embed.training_volume.1"
MIN_BODY_ML = 100.0  # views of less, as of a fiducial beside a patient, hardly ever have places in common


def to_training_volume(volume: Volume, name: str, info: EmbedderInfo) -> TrainingVolume:
    """The body of a volume on SAM's grid, int16 HU, with its body mask; the mask is empty where there is no patient."""
    cut, body = cut_body(volume, info.spacing_mm)
    return TrainingVolume(name, torch.from_numpy(cut.array), torch.from_numpy(body), tuple(info.spacing_mm))


def shows_patient(volume: TrainingVolume) -> bool:
    """Whether there is enough to make two views of: at least two slices and MIN_BODY_ML within the patient."""
    body_ml = int(volume.body.sum()) * np.prod(volume.spacing_mm) / 1000
    return min(volume.hu.shape) >= 2 and body_ml >= MIN_BODY_ML


def default_grid_dir(store_dir: str | Path, spacing_mm: Sequence[float]) -> Path:
    """Beside the store's own files, one folder for each grid."""
    return Path(store_dir) / f"sam_grid_{'x'.join(f'{side:g}' for side in spacing_mm)}mm"


def make_training_volumes(
    store: VolumeStore,
    info: EmbedderInfo,
    grid_dir: str | Path,
    num_threads: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Write this rank's share of the files that are missing, or were made from another CT; say how many were written.

    A case that shows too little of a patient gets a file without voxels, so that it is looked at once.

    Raises:
        FileWriteError: the folder cannot be written to, or is full; what is finished stays.
    """
    share = store.names[rank::world_size]
    missing = [name for name in share if not _is_made(Path(grid_dir), name, _header(store, name, info))]

    def make(name: str) -> None:
        made = to_training_volume(store.read(name), name, info)
        tensors = {"hu": made.hu, "body": torch.from_numpy(np.packbits(made.body.numpy()))}
        if not shows_patient(made):
            tensors = {"hu": torch.zeros(0, 0, 0, dtype=torch.int16), "body": torch.zeros(0, dtype=torch.uint8)}
        try:
            write_bytes(_path(Path(grid_dir), name), save(tensors, metadata=_header(store, name, info)))
        except FileWriteError as error:
            raise type(error)(f"{error}; --grid_dir chooses another folder") from error

    counts = {"initial": len(share) - len(missing), "total": len(share)}
    bar = tqdm(desc="SAM's grid", unit="case", disable=rank > 0 or not missing, **counts)
    with bar, ThreadPoolExecutor(max(1, num_threads)) as pool:
        for _ in pool.map(make, missing):
            bar.update()
    return len(missing)


class TrainingVolumes(Sequence[TrainingVolume]):
    """The made volumes of a store, in its order, without those of too little; item i is mapped when asked for.

    Holds paths and no voxels: processes receive it at once, and what they read of a file they share.
    """

    def __init__(self, store: VolumeStore, info: EmbedderInfo, grid_dir: str | Path, rank: int = 0) -> None:
        """Open `grid_dir`, where `make_training_volumes` has run on all ranks; rank 0 prints which are left out.

        Raises:
            ValueError: none is left.
        """
        self.grid_dir, self.spacing_mm = Path(grid_dir), tuple(info.spacing_mm)
        self.names = []
        for name in store.names:
            with safe_open(_path(self.grid_dir, name), framework="pt") as stored:
                has_voxels = stored.get_slice("hu").get_shape()[0] > 0
            if has_voxels:
                self.names.append(name)
            elif rank == 0:
                reason = f"less than {MIN_BODY_ML:g} ml of a patient (denser than -500 HU), or a single slice"
                print(f"left out {name}: {reason}", file=sys.stderr)
        if not self.names:
            raise ValueError(
                f"{store.store_dir}: none of its {len(store)} training volumes shows a patient ({MIN_BODY_ML:g} ml "
                "denser than -500 HU, in two slices or more); check that the files of --json_list are CT in HU"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> TrainingVolume:
        """Volume `index`; its voxels are read from the disk where they are used.

        Raises:
            ValueError: its file was removed or damaged since.
        """
        name = self.names[index]
        path = _path(self.grid_dir, name)
        try:
            with safe_open(path, framework="pt") as stored:
                hu, bits = stored.get_tensor("hu"), stored.get_tensor("body")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read any more ({error}); start again, and it is made anew") from error
        body = np.unpackbits(bits.numpy(), count=hu.numel()).astype(bool).reshape(hu.shape)
        return TrainingVolume(name, hu, torch.from_numpy(body), self.spacing_mm)


def _path(grid_dir: Path, name: str) -> Path:
    return grid_dir / f"{name}{SUFFIX}"


def _header(store: VolumeStore, name: str, info: EmbedderInfo) -> dict[str, str]:
    spacing = " ".join(f"{side:g}" for side in info.spacing_mm)
    return {"format": FORMAT, "spacing_mm": spacing, "source": store.record(name).identity}


def _is_made(grid_dir: Path, name: str, header: dict[str, str]) -> bool:
    """Whether the file is there, whole, and made from this CT for this grid."""
    try:
        with safe_open(_path(grid_dir, name), framework="pt") as stored:
            return stored.metadata() == header
    except (OSError, SafetensorError):
        return False
