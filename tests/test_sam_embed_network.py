"""SAM's network: published names, shapes and golden outputs; where output voxels lie; the small options."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from sam_embed.network import AnatomicalEmbedder
from tests.golden_fill import fill_by_name, golden_arrays, golden_file, known
from tests.sam_fakes import compact_options


@pytest.mark.parametrize("semantic, golden", [(False, "sam_state_dict.json"), (True, "samv2_state_dict.json")])
def test_state_dict_has_the_published_names_and_shapes(semantic, golden):
    published = json.loads(golden_file(golden).read_text())
    ours = {name: list(tensor.shape) for name, tensor in AnatomicalEmbedder(semantic=semantic).state_dict().items()}
    assert ours == published


def test_outputs_match_the_published_network():
    golden = golden_arrays("golden_sam.npz")
    network = fill_by_name(AnatomicalEmbedder()).eval()
    volume = torch.from_numpy(golden["input"])
    with torch.no_grad():
        fine, coarse = network(volume)
        stages = network.backbone(volume)
    np.testing.assert_allclose(*known(fine, golden["fine"]), atol=1e-5)
    np.testing.assert_allclose(*known(coarse, golden["coarse"]), atol=1e-5)
    for number, stage in enumerate(stages):
        np.testing.assert_allclose([stage.mean(), stage.std()], golden[f"backbone{number}_mean_std"], rtol=1e-4)


@pytest.mark.parametrize(
    "shape, fine, coarse", [((48, 64, 64), (24, 32, 32), (12, 4, 4)), ((33, 47, 50), (16, 24, 25), (8, 3, 4))]
)
def test_output_sizes(shape, fine, coarse):
    network = AnatomicalEmbedder(width=4, embed_dim=8).eval()
    with torch.no_grad():
        outputs = network(torch.zeros(1, 1, *shape))
    assert [tuple(output.shape[2:]) for output in outputs] == [fine, coarse]


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_compact_network_keeps_names_and_input_resolution(norm):
    network = AnatomicalEmbedder(**compact_options(width=8, embed_dim=16, norm=norm)).eval()
    published = set(AnatomicalEmbedder(width=8).state_dict())
    assert set(network.state_dict()) <= published
    with torch.no_grad():
        fine, coarse = network(torch.randn(2, 1, 20, 24, 17))
    assert fine.shape == (2, 16, 20, 24, 17) and coarse.shape == (2, 16, 3, 3, 3)
    torch.testing.assert_close(fine.norm(dim=1), torch.ones(2, 20, 24, 17))
    rebuilt = AnatomicalEmbedder(**dataclasses.asdict(network.options))
    rebuilt.load_state_dict(network.state_dict(), strict=True)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="choose one of batch, instance, group"):
        AnatomicalEmbedder(norm="layer")


def test_grids_say_where_outputs_lie():
    published = AnatomicalEmbedder(width=4, embed_dim=8)
    assert published.fine_grid() == ((2.0, 2.0, 2.0), (0.5, 0.0, 0.0))
    assert published.coarse_grid() == ((4.0, 16.0, 16.0), (0.5, 0.0, 0.0))
    compact = AnatomicalEmbedder(**compact_options(width=4, embed_dim=8))
    assert compact.fine_grid() == ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert compact.coarse_grid() == ((8.0, 8.0, 8.0), (0.0, 0.0, 0.0))
