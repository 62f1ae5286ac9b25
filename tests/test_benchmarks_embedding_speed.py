"""The benchmark of embedding: every way gives the plain network's vectors and matches; speed is not tested."""

import pytest
import torch

from benchmarks import embedding_speed
from benchmarks.embedding_speed import PLAIN, WAYS
from benchmarks.results import HEADER

pytestmark = pytest.mark.usefixtures("one_thread")


def flags_of(*words: str):
    return embedding_speed.make_flags().parse_args(["--quick", "--num_threads", "1", *words])


def test_ways_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_speed, "keep_freed_memory", lambda: False)  # would last for all other tests
    found, kept = {}, {}
    for way in WAYS:
        flags = flags_of("--only", way, "--kept", str(tmp_path / "kept.pt"))
        found[way] = embedding_speed.run_one(flags)
        kept[way] = torch.load(tmp_path / "kept.pt")
    compared = embedding_speed.compare(kept, embedding_speed.make_network(flags), embedding_speed.QUICK_TORSO)
    for way in WAYS:
        found[way] |= compared[way]
        assert found[way]["seconds"] > 0
        assert found[way]["same_voxel"] > (0.9 if "bf16" in way else 0.99)  # random weights: near ties
        assert found[way]["least_cosine"] > (0.999 if "bf16" in way else 0.99999)
    assert found[PLAIN]["same_voxel"] == 1.0
    lines = embedding_speed.rows({"ways": found})
    assert len(lines) >= 2 * (len(WAYS) - 1) and all(len(row) == len(HEADER) for row in lines)


@pytest.mark.parametrize(("precision", "num_ways"), [("bf16", 4), ("fp32", 3)])
def test_bf16_is_left_out_where_it_is_emulated(precision, num_ways, monkeypatch):
    monkeypatch.setattr(embedding_speed, "fast_precision", lambda device: precision)
    ways = embedding_speed.ways_here()
    assert ways == list(WAYS)[:num_ways]
    rows = embedding_speed.rows(
        {"ways": {way: {"seconds": 1.0, "peak_gb": None, "same_voxel": 1, "least_cosine": 1} for way in ways}}
    )
    assert len(rows) == 2 * (num_ways - 1)


def test_a_way_that_fails_is_named(monkeypatch):
    with pytest.raises(RuntimeError, match="plain network.*nowhere.pth"):
        embedding_speed.run(flags_of("--checkpoint_file", "nowhere.pth"))


def test_the_figures_of_one_way_alone_have_nothing_beside_them():
    """Each way is measured in a process of its own, which prints its figures too."""
    for way in WAYS:
        assert embedding_speed.rows({"ways": {way: {"seconds": 1.0, "peak_gb": 2.0}}}) == []
