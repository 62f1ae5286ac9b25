"""Features of whole volumes: each cell is where its affine says, windows leave no seams, files resume and share out."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open

from datasets.ct.geometry import index_to_world
from engine.features import FeatureExtractor, load_features
from engine.features.dense import dense_maps, owned_cells
from engine.features.orientation import in_axis_order
from engine.segmentation.setup import Preprocessing
from engine.segmentation.sliding_window import WindowOptions
from engine.weights import save_weights
from models.backbones import BACKBONES
from scripts import extract_features

CPU = torch.device("cpu")
ROI = (32, 32, 32)
DESCRIPTION = {
    "backbone": {"name": "unet", "feature_size": 8, "in_channels": 1},
    "preprocessing": {"axcodes": "SPL", "spacing_mm": [4.0, 4.0, 4.0], "hu_min": -125.0, "hu_max": 225.0, "roi": ROI},
}


def means(volumes: torch.Tensor) -> dict[int, torch.Tensor]:
    """Maps whose cells are the means of their voxels."""
    return {stride: torch.nn.functional.avg_pool3d(volumes, stride) for stride in (2, 4)}


def offsets(volumes: torch.Tensor) -> dict[int, torch.Tensor]:
    """Maps that hold the place of every cell in its window, along D, H and W, in voxels from the middle."""
    axes = torch.meshgrid(*(torch.arange(side // 2) * 2 + 1 - side / 2 for side in volumes.shape[2:]), indexing="ij")
    return {2: torch.stack(axes)[None].expand(len(volumes), -1, -1, -1, -1)}


# Windows


@pytest.mark.parametrize("shape", [(8, 16, 16), (21, 30, 47), (7, 9, 40)])
def test_cells_of_a_ramp_hold_the_ramp_at_their_place(shape):
    """Whatever the size of the volume: no seams, no shift."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
    ramp = np.tensordot((30, 50, 70), index, 1)
    options = WindowOptions((8, 16, 16), hu_min=0, hu_max=10_000, window_batch=3)
    found = dense_maps(means, torch.from_numpy(ramp.astype(np.int16)), (2, 4), 4, options, CPU)
    for stride, (values, to_voxels) in found.items():
        cells = np.stack(np.meshgrid(*map(np.arange, values.shape[1:]), indexing="ij"), axis=-1)
        places = index_to_world(to_voxels, cells)
        half = stride / 2 - 0.5
        is_whole = ((places >= half) & (places <= np.array(shape) - 1 - half)).all(-1)
        assert is_whole.sum() > 3 and (np.array(values.shape[1:]) <= np.array(shape) // stride + 2).all()
        assert np.abs(values[0].numpy() * 10_000 - places @ (30, 50, 70))[is_whole].max() < 0.1, stride
        # Every voxel lies in a cell, and every cell holds a voxel.
        first, last = (
            index_to_world(to_voxels, np.array(cell)) for cell in ((0, 0, 0), np.array(values.shape[1:]) - 1)
        )
        assert (first - half <= 0).all() and (first + half >= 0).all()
        assert (last + half >= np.array(shape) - 1).all() and (last - half <= np.array(shape) - 1).all()


def test_a_cell_comes_from_the_window_that_it_is_most_central_in():
    hu = torch.zeros(40, 16, 64, dtype=torch.int16)
    values, _ = dense_maps(offsets, hu, (2,), 4, WindowOptions((16, 16, 16)), CPU)[2]
    for axis, size in ((0, 40), (2, 64)):
        along = values[axis].movedim(axis, 0)
        assert torch.equal(along, along[:, :1, :1].expand_as(along))
        inner = along[4 : size // 2 - 4, 0, 0]
        assert inner.abs().max() <= 5, "windows lie 8 apart or less, on multiples of 4"
    assert values[1, 0, :, 0].tolist() == [-7, -5, -3, -1, 1, 3, 5, 7]


def test_every_cell_has_one_window():
    parts = owned_cells(64, 16, [0, 8, 20, 32, 48], 2)
    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(32))


def test_maps_of_slices_are_as_deep_as_the_volume():
    hu = (100 * torch.arange(12)[:, None, None] + torch.zeros(12, 24, 33)).to(torch.int16)
    options = WindowOptions((1, 16, 16), hu_min=0, hu_max=1200, window_batch=5)
    flat = {2: lambda x: torch.nn.functional.avg_pool3d(x, (1, 2, 2))}
    values, to_voxels = dense_maps(lambda x: {2: flat[2](x)}, hu, (2,), 2, options, CPU)[2]
    assert values.shape == (1, 12, 12, 17)
    assert torch.allclose(values[0, :, 3, 3], torch.arange(12) / 12)
    assert np.diag(to_voxels).tolist() == [1, 2, 2, 1]


# The extractor


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_affines_point_at_the_world_whatever_the_files_orientation(codes, tmp_path):
    """HU that rise along world axes are found again at the world place of every cell."""
    affine = np.diag([3.0, 3.0, 2.0, 1.0])
    affine[:3, 3] = (-40, 20, 100)
    index = np.stack(np.meshgrid(*map(np.arange, (30, 26, 40)), indexing="ij"), axis=-1)
    gradient, centre = np.array((4.0, 6.0, -5.0)), index_to_world(affine, np.array([[14.5, 12.5, 19.5]]))[0]
    hu = (index_to_world(affine, index) - centre) @ gradient
    image = nib.Nifti1Image(hu.astype(np.float32), affine)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(image.as_reoriented(turn), tmp_path / "ct.nii.gz")
    backbone = SimpleNamespace(encode=means, channels={2: 1, 4: 1})
    known = Preprocessing((2.0, 2.5, 2.5), -1000.0, 1000.0, (16, 16, 16))
    extract = FeatureExtractor(backbone, known, WindowOptions(known.roi), CPU, None, [])
    features = extract(tmp_path / "ct.nii.gz")
    assert list(features.maps) == [2, 4]
    for stride, values in features.maps.items():
        cells = np.stack(np.meshgrid(*map(np.arange, values.shape[1:]), indexing="ij"), axis=-1)
        expected = (index_to_world(features.affines[stride], cells) - centre) @ gradient
        inner = (slice(1, -1),) * 3
        assert np.abs(values[0].numpy() * 2000 - 1000 - expected)[inner].max() < 1.5, stride
        assert features.geometry()[str(stride)]["spacing_mm"] == pytest.approx(
            [2.0 * stride, 2.5 * stride, 2.5 * stride]
        )
    with pytest.raises(ValueError, match=r"--maps 32: the encoder has maps at strides \[2, 4\]"):
        extract(tmp_path / "ct.nii.gz", (32,))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "unet.safetensors"
    save_weights(BACKBONES["unet"](8, ROI, None, False).network.state_dict(), DESCRIPTION, path)
    return path


def test_loaded_features_are_what_the_network_makes(weights):
    """Of a volume of one window, given in HU."""
    extract = load_features(weights, device="cpu")
    assert extract.report.share == 1 and not extract.backbone.training
    hu = torch.randint(-200, 300, (1, 1, *ROI)).float()
    torch.manual_seed(0)
    network = BACKBONES["unet"](8, ROI, None, False).eval()
    with torch.no_grad():
        expected = network.encode(((hu + 125) / 350).clamp(0, 1))
    features = extract(hu)
    assert list(features.maps) == [1, 2, 4, 8, 16]
    for stride, values in features.maps.items():
        torch.testing.assert_close(values, expected[stride][0])
    torch.testing.assert_close(features.pooled(), torch.cat([one[0].mean((1, 2, 3)) for one in expected.values()]))
    assert features.affines[16][:3, :3].tolist() == [[0, 0, -64], [0, -64, 0], [64, 0, 0]]
    with pytest.raises(ValueError, match=r"shape \[1, 32, 32, 32\]: expected HU \[1, 1, D, H, W\]"):
        extract(hu[0])


def test_flags_speak_for_weights_that_do_not_describe_themselves(weights, tmp_path):
    torch.save(BACKBONES["unet"](8, ROI, None, False).network.state_dict(), tmp_path / "w.pth")
    sizes = {"backbone": "unet", "feature_size": 8, "spacing_mm": (2.0,), "a_min": -175, "roi_z": 48}
    extract = load_features(tmp_path / "w.pth", device="cpu", **sizes)
    assert extract.preprocessing == Preprocessing((2.0, 2.0, 2.0), -175.0, 225.0, (48, 96, 96))
    with pytest.raises(ValueError, match="--axcodes RAS: slices .--roi_z 1. are axial"):
        load_features(tmp_path / "w.pth", device="cpu", **(sizes | {"axcodes": "RAS", "roi_z": 1}))
    with pytest.warns(UserWarning, match="--a_min -175 differs from the -125"):
        load_features(weights, device="cpu", a_min=-175)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SPL", "IAR"])
def test_encoders_of_another_axis_order_see_their_own_and_give_ours(codes):
    """nibabel turns the same arrays."""
    weight = torch.randn(3, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def encode(windows: torch.Tensor) -> dict[int, torch.Tensor]:
        return {2: torch.nn.functional.avg_pool3d(torch.conv3d(windows, weight, padding=1), 2)}

    def turned(array: np.ndarray, source: str, target: str) -> np.ndarray:
        ours, theirs = (nib.orientations.axcodes2ornt(text) for text in (source, target))
        return nib.orientations.apply_orientation(array, nib.orientations.ornt_transform(ours, theirs)).copy()

    window = np.random.default_rng(0).normal(size=(8, 12, 16)).astype(np.float32)
    theirs = encode(torch.from_numpy(turned(window, "SPL", codes))[None, None])[2][0]
    ours = in_axis_order(encode, codes)(torch.from_numpy(window)[None, None])[2][0]
    assert ours.shape == (3, 4, 6, 8)
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, torch.from_numpy(turned(other.numpy(), codes, "SPL")))


@pytest.mark.parametrize("codes", ["RAR", "XYZ", "RA", "rasp"])
def test_text_that_is_no_axis_order_is_refused(codes, weights):
    with pytest.raises(ValueError, match=f"--axcodes {codes}: expected one letter each"):
        load_features(weights, device="cpu", axcodes=codes)


def test_axis_order_reaches_the_encoder(weights):
    """A volume and its turned maps differ from those of the network's own order."""
    hu = torch.randint(-200, 300, (1, 1, *ROI)).float()
    ours, theirs = (load_features(weights, device="cpu", axcodes=codes)(hu, (8,)) for codes in ("SPL", "RAS"))
    assert ours.maps[8].shape == theirs.maps[8].shape and not torch.allclose(ours.maps[8], theirs.maps[8], atol=1e-3)


# The command


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three CT and a file that is none."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for number in range(3):
        hu = rng.normal(0, 200, (20 + 20 * number, 30, 30)).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, np.diag([4.0, 4.0, 4.0, 1.0])), folder / f"case{number}.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"no CT")
    return folder


def extract(corpus, output_dir, weights, *more: str) -> None:
    words = [f"--data_dir={corpus}", f"--output_dir={output_dir}", f"--weights={weights}", "--device=cpu", *more]
    extract_features.main(words)


def test_command_writes_vectors_with_their_geometry_and_goes_on(corpus, weights, tmp_path, capsys):
    extract(corpus, tmp_path, weights, "--overlap=0")
    told = capsys.readouterr()
    assert "wrote the features of 3 cases, 0 were there already, 1 failed" in told.out
    assert "failed broken" in told.err and "keys of the encoder loaded" in told.out
    described = json.loads((tmp_path / "case1.json").read_text())
    assert list(described["maps"]) == ["16"] and described["maps"]["16"]["spacing_mm"] == [64.0] * 3
    with safe_open(tmp_path / "case1.safetensors", "pt") as file:
        vector = file.get_tensor("pooled")
        assert json.loads(file.metadata()["maps"]) == described["maps"]
    plain = load_features(weights, device="cpu", overlap=0)(corpus / "case1.nii.gz", (16,))
    torch.testing.assert_close(vector, plain.pooled())
    assert described["maps"]["16"]["affine"] == plain.affines[16].tolist()
    (tmp_path / "case2.safetensors").unlink()
    extract(corpus, tmp_path, weights, "--overlap=0")
    assert "wrote the features of 1 cases, 2 were there already" in capsys.readouterr().out
    extract(corpus, tmp_path, weights, "--overlap=0", "--maps", "8", "16")
    assert "wrote the features of 3 cases, 0 were there already" in capsys.readouterr().out
    with safe_open(tmp_path / "case1.safetensors", "pt") as file:
        assert file.get_tensor("pooled").shape == (32 + 64,)


def test_command_writes_maps_as_npy_and_shares_cases_out(corpus, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        extract(corpus, tmp_path, weights, "--overlap=0", "--dense", "--maps", "4", "--form=npy", "--dtype=float16")
        names.append({path.name.split(".")[0] for path in tmp_path.glob("*.stride4.npy")})
    assert len(names[0]) in (1, 2) and names[1] == {"case0", "case1", "case2"}
    made = np.load(tmp_path / "case0.stride4.npy")
    plain = load_features(weights, device="cpu", overlap=0)(corpus / "case0.nii.gz", (4,)).maps[4]
    assert made.dtype == np.float16
    np.testing.assert_allclose(made, plain.numpy(), atol=2e-3, rtol=2e-3)
    assert list(made.shape[1:]) == json.loads((tmp_path / "case0.json").read_text())["maps"]["4"]["shape"]


def test_command_refuses_maps_that_there_are_not(corpus, weights, tmp_path):
    with pytest.raises(ValueError, match="--maps 3: the encoder has maps at strides"):
        extract(corpus, tmp_path, weights, "--maps", "3")
