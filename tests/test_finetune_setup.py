"""What finetuning takes over from the weights, and mistakes in its flags."""

import pytest

from engine.flags import options_of
from engine.segmentation.flags import FinetuneOptions
from engine.segmentation.setup import Preprocessing, resolve_network, resolve_preprocessing
from scripts.finetune_segmentation import make_flags

DESCRIBED = {"axcodes": "SPL", "spacing_mm": [3.0, 2.0, 2.0], "hu_min": -175.0, "hu_max": 250.0, "roi": [64, 96, 96]}
NOTHING = {"spacing_mm": None, "hu_min": None, "hu_max": None, "roi": [None, None, None]}


def test_values_come_from_the_weights():
    found, warnings = resolve_preprocessing(NOTHING, DESCRIBED, in_store=[1.0, 1.0, 1.0])
    assert found == Preprocessing((3.0, 2.0, 2.0), -175.0, 250.0, (64, 96, 96)) and not warnings
    assert Preprocessing.from_dict(found.as_dict()) == found and found.as_dict()["axcodes"] == "SPL"


def test_flags_win_with_a_warning_where_they_differ():
    given = NOTHING | {"spacing_mm": [2.0, 2.0, 2.0], "hu_min": -175.0, "roi": [None, 64, None]}
    found, warnings = resolve_preprocessing(given, DESCRIBED)
    assert found.spacing_mm == (2.0, 2.0, 2.0) and found.roi == (64, 64, 96)
    assert len(warnings) == 1 and "--spacing_mm 2 2 2 differs from the 3 2 2" in warnings[0]
    _, warnings = resolve_preprocessing(NOTHING | {"spacing_mm": "native", "hu_max": 300.0}, DESCRIBED)
    assert len(warnings) == 2 and "--a_max 300" in warnings[1]
    _, warnings = resolve_preprocessing(NOTHING, DESCRIBED | {"axcodes": "RAS"})
    assert len(warnings) == 1 and "axis order RAS, here it is SPL" in warnings[0]


def test_without_weights_the_store_and_then_the_defaults_decide():
    found, warnings = resolve_preprocessing(NOTHING, {}, in_store="native")
    assert found.spacing_mm is None and not warnings
    assert resolve_preprocessing(NOTHING, {})[0] == Preprocessing((2.0, 1.5, 1.5), -125.0, 225.0, (96, 96, 96))
    with pytest.raises(ValueError, match="--a_min 400 --a_max 225"):
        resolve_preprocessing(NOTHING | {"hu_min": 400.0}, {})


def test_network_comes_from_the_weights():
    assert resolve_network(None, None, {"name": "unet", "feature_size": 24}) == ("unet", 24, [])
    assert resolve_network(None, None, {}) == ("swin_unetr", 48, [])
    assert resolve_network(None, 0, {"feature_size": 24})[1] == 0, "a flag that was given is not unset"
    name, size, warnings = resolve_network("swin_unetr", 24, {"name": "unet", "feature_size": 24})
    assert (name, size) == ("swin_unetr", 24) and warnings == ["--backbone swin_unetr differs from the weights' unet"]


def test_all_mistakes_are_told_together(tmp_path):
    words = ["--data_dir", str(tmp_path / "no"), "--weights", "none.pth", "--steps", "0", "--overlap", "1"]
    words += ["--layer_decay", "0", "--min_lr", "1", "--val_freq", "0", "--patience", "3", "--feature_size", "0"]
    words += ["--seed", "-1", "--fold", "-1", "--num_labelled", "-1", "--clip_grad", "-1"]
    with pytest.raises(ValueError) as told:
        options_of(make_flags().parse_args(words), FinetuneOptions)
    for part in (
        "--json_list is not given",
        "--output_dir is not given",
        "is not a folder",
        "--weights none.pth: no such file",
        "--steps 0: expected 1 or more",
        "--overlap 1.0: expected 0 to below 1",
        "--layer_decay 0.0",
        "--min_lr 1.0, --lr 0.0003",
        "--patience 3, --val_freq 0",
        "--feature_size 0: expected 1 or more",
        "--seed -1: expected 0 or more",
        "--fold -1: expected 0 or more",
        "--num_labelled -1: expected 0 (all) or more",
        "--clip_grad -1.0: expected 0 (off) or more",
    ):
        assert part in str(told.value), part
