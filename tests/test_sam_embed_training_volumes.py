"""The volumes on SAM's grid: made once, by all ranks together, anew where the CT changed, and mapped when used."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.ct import geometry
from datasets.ct.nifti import write_nifti
from datasets.lists.data_list import Case
from datasets.store.files import FileWriteError
from datasets.store.volumes import VolumeStore, build_store
from sam_embed import preprocess
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.training import training_volumes
from sam_embed.training.training_volumes import TrainingVolumes, make_training_volumes, to_training_volume
from sam_embed.training.views import ViewOptions, ViewPairDataset

INFO = EmbedderInfo(spacing_mm=(8.0, 8.0, 8.0))


def make_store(folder: Path, names=("a", "b", "c"), inside: float = 40, air: tuple[str, ...] = ()) -> VolumeStore:
    """Bodies of 12 x 14 x 24 voxels of 8 mm in air; those of `air` are lungs at the most."""
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        hu = np.full((12, 24, 32), -1000, np.int16)
        hu[:, 4:18, 5:29] = -990 if name in air else inside + number
        write_nifti(folder / f"{name}.nii.gz", hu, np.diag([-8.0, -8.0, 8.0, 1.0])[:, [2, 1, 0, 3]])
    build_store([Case(name, folder / f"{name}.nii.gz") for name in names], folder / "store", progress=False)
    return VolumeStore(folder / "store", list(names))


def test_volumes_are_the_body_on_the_grid(tmp_path):
    store, grid = make_store(tmp_path), tmp_path / "grid"
    info = EmbedderInfo(spacing_mm=(12.0, 16.0, 8.0))
    assert make_training_volumes(store, info, grid) == 3
    for name, volume in zip(store.names, TrainingVolumes(store, info, grid)):
        plain = to_training_volume(store.read(name), name, info)
        assert volume.name == name and volume.spacing_mm == info.spacing_mm
        assert volume.hu.dtype == torch.int16 and volume.hu.shape == volume.body.shape == (8, 7, 24)
        assert torch.equal(volume.hu, plain.hu) and torch.equal(volume.body, plain.body)
        assert volume.body.any(dim=0).any(dim=1).all()  # cut to the body


def test_each_volume_is_made_once_by_one_of_the_ranks(tmp_path, monkeypatch):
    store, grid = make_store(tmp_path), tmp_path / "grid"
    assert [make_training_volumes(store, INFO, grid, rank=rank, world_size=2) for rank in (0, 1)] == [2, 1]
    monkeypatch.setattr(training_volumes, "to_training_volume", None)
    assert make_training_volumes(store, INFO, grid) == 0


def test_a_changed_ct_and_a_truncated_file_are_made_anew(tmp_path):
    make_training_volumes(make_store(tmp_path), INFO, tmp_path / "grid")
    store = make_store(tmp_path / "later", inside=70)
    whole = (tmp_path / "grid" / "b.safetensors").read_bytes()
    assert make_training_volumes(store, INFO, tmp_path / "grid") == 3
    assert int(TrainingVolumes(store, INFO, tmp_path / "grid")[1].hu.max()) == 71
    (tmp_path / "grid" / "b.safetensors").write_bytes(whole[: len(whole) // 2])
    assert make_training_volumes(store, INFO, tmp_path / "grid") == 1
    assert int(TrainingVolumes(store, INFO, tmp_path / "grid")[1].hu.max()) == 71


def test_another_grid_in_the_same_folder_is_made_anew(tmp_path):
    store, grid = make_store(tmp_path), tmp_path / "grid"
    make_training_volumes(store, INFO, grid)
    assert make_training_volumes(store, EmbedderInfo(spacing_mm=(8.0, 8.0, 16.0)), grid) == 3
    names = {training_volumes.default_grid_dir("s", spacing).name for spacing in ((2.0, 2.0, 2.0), (2.5, 2.0, 2.0))}
    assert names == {"sam_grid_2x2x2mm", "sam_grid_2.5x2x2mm"}


def test_processes_receive_paths_and_no_voxels(tmp_path):
    store, grid = make_store(tmp_path), tmp_path / "grid"
    make_training_volumes(store, INFO, grid)
    options = ViewOptions(shape=(8, 16, 16), spacing_mm=INFO.spacing_mm, num_points=16)
    mapped = ViewPairDataset(TrainingVolumes(store, INFO, grid), options, INFO, seed=0)
    held = [to_training_volume(store.read(name), name, INFO) for name in store.names]
    assert len(pickle.dumps(mapped)) < 4000 < len(pickle.dumps(held[0].hu))
    for name, value in ViewPairDataset(held, options, INFO, seed=0)[5].items():
        assert torch.equal(value, mapped[5][name]), name


def test_a_file_lost_on_the_way_is_named(tmp_path):
    store, grid = make_store(tmp_path), tmp_path / "grid"
    make_training_volumes(store, INFO, grid)
    volumes = TrainingVolumes(store, INFO, grid)
    (grid / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="b.safetensors: cannot be read any more.*start again"):
        volumes[1]


def test_a_folder_that_cannot_be_written_to_is_told_with_its_flag(tmp_path):
    (tmp_path / "grid").write_text("a file where the folder should be")
    with pytest.raises(FileWriteError, match="grid.*--grid_dir chooses another folder"):
        make_training_volumes(make_store(tmp_path), INFO, tmp_path / "grid")


def test_volumes_of_air_are_left_out_and_bodies_are_outlined_once(tmp_path, monkeypatch, capsys):
    store, grid = make_store(tmp_path, ("air", "patient", "more_air"), air=("air", "more_air")), tmp_path / "grid"
    calls, body_mask = [], geometry.body_mask
    monkeypatch.setattr(preprocess, "body_mask", lambda *words: calls.append(words) or body_mask(*words))
    assert make_training_volumes(store, INFO, grid) == 3 and make_training_volumes(store, INFO, grid) == 0
    capsys.readouterr()
    (volume,) = TrainingVolumes(store, INFO, grid)
    assert volume.name == "patient" and volume.hu.shape == volume.body.shape == (12, 14, 24) and len(calls) == 3
    told = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(":")[0] for line in told) == ["left out air", "left out more_air"]
    assert all("less than 100 ml of a patient" in line for line in told)
    TrainingVolumes(store, INFO, grid, rank=1)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="none of its 2 training volumes shows a patient.*--json_list"):
        TrainingVolumes(VolumeStore(tmp_path / "store", ["air", "more_air"]), INFO, grid)


def test_a_single_slice_and_a_fiducial_are_left_out(tmp_path, capsys):
    """Views of them would be air and noise, or would be drawn for ever."""
    store = make_store(tmp_path, ("a",))
    for name, shape in (("slice", (1, 40, 40)), ("fiducial", (12, 24, 32))):
        hu = np.full(shape, -1000, np.int16)
        hu[(slice(None), slice(4, 36), slice(4, 36)) if name == "slice" else (slice(5, 7),) * 3] = 40
        write_nifti(tmp_path / f"{name}.nii.gz", hu, np.diag([-8.0, -8.0, 8.0, 1.0])[:, [2, 1, 0, 3]])
        build_store([Case(name, tmp_path / f"{name}.nii.gz")], tmp_path / "store", progress=False)
    store = VolumeStore(tmp_path / "store")
    make_training_volumes(store, INFO, tmp_path / "grid")
    assert TrainingVolumes(store, INFO, tmp_path / "grid").names == ["a"]
    told = capsys.readouterr().err
    assert "left out fiducial: less than 100 ml" in told and "left out slice:" in told and "a single slice" in told
