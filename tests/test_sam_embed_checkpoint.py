"""Checkpoints of the embedding network: ours, the published layouts, and clear words about wrong files."""

import collections

import numpy as np
import pytest
import torch

from sam_embed.checkpoint import CheckpointError, EmbedderInfo, embedder_checkpoint, load_embedder, write_small
from sam_embed.network import AnatomicalEmbedder
from tests.sam_fakes import compact_options, save_embedder


def small_network() -> AnatomicalEmbedder:
    return AnatomicalEmbedder(**compact_options(width=8, embed_dim=16))


def test_own_checkpoint_comes_back_the_same(tmp_path):
    network, info = small_network(), EmbedderInfo(spacing_mm=(6.0, 5.0, 4.0), hu_max=1000.0)
    save_embedder(tmp_path / "sam.pth", network, info, step=7)
    loaded, loaded_info = load_embedder(tmp_path / "sam.pth")
    assert not loaded.training and loaded.options == network.options
    assert loaded_info.preprocessing() == info.preprocessing() and loaded_info.spacing_mm == (6.0, 5.0, 4.0)
    assert loaded_info.source == "sam.pth" and len(loaded_info.fingerprint) == 16
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("semantic", [False, True])
@pytest.mark.parametrize("prefix, is_zip", [("module.", True), ("", False)])
def test_mmcv_file_of_the_published_network(tmp_path, semantic, prefix, is_zip):
    network = AnatomicalEmbedder(semantic=semantic)
    weights = network.state_dict()
    weights = collections.OrderedDict((f"{prefix}{name}", tensor) for name, tensor in weights.items())
    weights._metadata = {"": {"version": 1}}  # as nn.Module.state_dict leaves it
    meta = {"epoch": 3, "iter": 20000, "time": "then", "mmcv_version": "1.4.7", "config": "a = 1", "CLASSES": ("x",)}
    meta["hook_msgs"] = {"best_score": np.float64(0.5), "best_score32": np.float32(0.5), "ids": np.arange(3)}
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    next(network.parameters()).grad = torch.ones_like(next(network.parameters()))
    optimizer.step()
    content = {"meta": meta, "state_dict": weights, "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "SAM.pth", _use_new_zipfile_serialization=is_zip)
    loaded, info = load_embedder(tmp_path / "SAM.pth")
    assert info.spacing_mm == (2.0, 2.0, 2.0) and (info.hu_min, info.hu_max, info.offset) == (-1024.0, 3071.0, -50.0)
    assert torch.equal(loaded.neck.fpn_convs[0].conv.weight, network.neck.fpn_convs[0].conv.weight)
    assert (loaded.semantic_head is not None) == semantic


def test_another_axis_order_is_refused(tmp_path):
    save_embedder(tmp_path / "sam.pth", small_network(), EmbedderInfo(axcodes="RAS"))
    with pytest.raises(CheckpointError, match="sam.pth: trained on volumes in axis order RAS, expected SPL"):
        load_embedder(tmp_path / "sam.pth")


def test_wrong_weights_are_listed(tmp_path):
    weights = AnatomicalEmbedder().state_dict()
    del weights["backbone.conv1.conv.weight"]
    weights["fc.weight"] = torch.zeros(3)
    weights["neck.fpn_convs.0.conv.bias"] = torch.zeros(7)
    torch.save(weights, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError) as caught:
        load_embedder(tmp_path / "wrong.pth")
    message = str(caught.value)
    assert "wrong.pth" in message
    assert 'Missing key(s) in state_dict: "backbone.conv1.conv.weight"' in message and '"fc.weight"' in message
    assert "size mismatch for neck.fpn_convs.0.conv.bias" in message


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"options": None}, "its options describe no SAM network"),
        ({"options": {"wide": 8}}, "its options describe no SAM network"),
        ({"preprocessing": 5}, "its preprocessing is 5"),
        ({"preprocessing": {"spacing_mm": [2.0]}}, "its preprocessing cannot be used .--spacing_mm"),
        ({"preprocessing": {"hu_min": float("nan")}}, "its preprocessing cannot be used .--hu_min nan"),
        ({"preprocessing": {"spacing": 2}}, "its preprocessing cannot be used"),
    ],
)
def test_a_checkpoint_that_describes_nothing_usable_is_refused(tmp_path, changed, message):
    torch.save(embedder_checkpoint(small_network(), EmbedderInfo()) | changed, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=f"odd.pth: {message}"):
        load_embedder(tmp_path / "odd.pth")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = small_network()
    next(network.parameters()).data.view(-1)[0] = float("inf")
    torch.save(embedder_checkpoint(network, EmbedderInfo()), tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="odd.pth: .*backbone.conv1.conv.weight holds values that are not finite"):
        load_embedder(tmp_path / "odd.pth")


class Code:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", ["code", "garbage", "empty", "list", "other kind", "absent"])
def test_other_files_are_refused_by_name(tmp_path, content, capsys):
    path = tmp_path / "bad.pth"
    if content == "code":
        torch.save({"state_dict": Code()}, path)
    elif content == "garbage":
        path.write_bytes(b"no checkpoint at all")
    elif content == "empty":
        path.touch()
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "other kind":
        torch.save({"kind": "alice", "student": {}}, path)
    with pytest.raises(CheckpointError, match=r"bad\.pth"):
        load_embedder(path)
    assert "must not run" not in capsys.readouterr().out


def test_a_small_file_holds_the_weights_in_half_precision_and_says_what_they_are(tmp_path):
    network, info = small_network(), EmbedderInfo(spacing_mm=(4.0, 4.0, 4.0), hu_max=600.0)
    save_embedder(tmp_path / "sam.pth", network, info)
    write_small(tmp_path / "sam.safetensors", network, info, {"steps": 3})
    loaded, found = load_embedder(tmp_path / "sam.safetensors")
    assert loaded.options == network.options and found.preprocessing() == info.preprocessing() and not loaded.training
    for name, tensor in network.state_dict().items():
        kept = loaded.state_dict()[name]
        assert kept.dtype == tensor.dtype and torch.equal(kept, tensor.half().to(tensor.dtype))
    again, copied = load_embedder(tmp_path / "sam.safetensors")
    assert copied.fingerprint == found.fingerprint != load_embedder(tmp_path / "sam.pth")[1].fingerprint
    assert (tmp_path / "sam.safetensors").stat().st_size < 0.6 * (tmp_path / "sam.pth").stat().st_size


def test_a_small_file_that_is_damaged_or_cannot_hold_the_weights_is_refused(tmp_path):
    network, path = small_network(), tmp_path / "sam.safetensors"
    write_small(path, network, EmbedderInfo(), {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="sam.safetensors: not readable as weights of a SAM network"):
        load_embedder(path)
    with pytest.raises(CheckpointError, match="sam.pth: expected a name that ends in .safetensors"):
        write_small(tmp_path / "sam.pth", network, EmbedderInfo(), {})
    with torch.no_grad():
        next(network.parameters()).fill_(1e6)
    with pytest.raises(CheckpointError, match="half precision does not hold"):
        write_small(path, network, EmbedderInfo(), {})
