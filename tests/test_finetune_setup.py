"""What finetuning takes over from the weights, and mistakes in its flags."""

import pytest

from datasets.store.format import create_settings
from engine.flags import flag_names, options_of
from engine.segmentation.flags import DECISIVE_FLAGS, FREE_FLAGS, GROUPS, RESOLVED_FLAGS, FinetuneOptions
from engine.segmentation.setup import Preprocessing, Setup, resolve_setup
from models.segmenters import SEGMENTERS
from scripts.finetune_segmentation import make_flags

DESCRIBED = {"axcodes": "SPL", "spacing_mm": [3.0, 2.0, 2.0], "hu_min": -175.0, "hu_max": 250.0, "roi": [64, 96, 96]}
STANDARD = Preprocessing((2.0, 1.5, 1.5), -125.0, 225.0, (96, 96, 96))


def resolve(described: dict | None = None, backbone: dict | None = None, store_dir=None, **given) -> Setup:
    weights = {"preprocessing": described or {}, "backbone": backbone or {}}
    return resolve_setup(weights, given, SEGMENTERS, store_dir)


def test_values_come_from_the_weights(tmp_path):
    create_settings(tmp_path, (1.0, 1.0, 1.0))
    setup = resolve(DESCRIBED, store_dir=tmp_path)
    found = setup.preprocessing
    assert found == Preprocessing((3.0, 2.0, 2.0), -175.0, 250.0, (64, 96, 96)) and not setup.notes
    assert Preprocessing.from_dict(found.as_dict()) == found and found.as_dict()["axcodes"] == "SPL"


def test_flags_win_with_a_warning_where_they_differ():
    setup = resolve(DESCRIBED, spacing_mm=[2.0, 2.0, 2.0], hu_min=-175.0, roi=[None, 64, None])
    assert setup.preprocessing.spacing_mm == (2.0, 2.0, 2.0) and setup.preprocessing.roi == (64, 64, 96)
    assert len(setup.notes) == 1 and "--spacing_mm 2 2 2 differs from the 3 2 2" in setup.notes[0]
    notes = resolve(DESCRIBED, spacing_mm="native", hu_max=300.0).notes
    assert len(notes) == 2 and "--a_max 300" in notes[1]
    notes = resolve(DESCRIBED | {"axcodes": "RAS"}).notes
    assert len(notes) == 1 and "axis order RAS, here it is SPL" in notes[0]


def test_without_weights_the_store_and_then_the_defaults_decide(tmp_path):
    assert resolve(store_dir=tmp_path).preprocessing == STANDARD, "no store there yet"
    create_settings(tmp_path, None)
    setup = resolve(store_dir=tmp_path)
    assert setup.preprocessing.spacing_mm is None and not setup.notes
    with pytest.raises(ValueError, match="--a_min 400 --a_max 225"):
        resolve(hu_min=400.0)


def test_network_comes_from_the_weights():
    unet = {"name": "unet", "feature_size": 24}
    assert resolve(backbone=unet) == Setup(STANDARD, "unet", 24)
    assert resolve() == Setup(STANDARD, "swin_unetr", 48)
    assert resolve(backbone=unet, feature_size=0).feature_size == 0, "a flag that was given is not unset"
    setup = resolve(backbone=unet, name="swin_unetr", feature_size=24)
    assert (setup.backbone, setup.feature_size) == ("swin_unetr", 24)
    assert len(setup.notes) == 1 and "--backbone swin_unetr differs from the unet that" in setup.notes[0]
    with pytest.raises(ValueError, match="'vit', expected nnformer"):
        resolve(backbone={"name": "vit"})


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


def test_every_flag_has_a_group_and_every_named_flag_exists():
    grouped = {name for kind in GROUPS.values() for name in flag_names(kind)} | {"resume"}
    assert grouped == set(flag_names(FinetuneOptions)) == set(vars(make_flags().parse_args([]))) - {"config"}
    assert grouped > DECISIVE_FLAGS | FREE_FLAGS | RESOLVED_FLAGS
    assert not DECISIVE_FLAGS & FREE_FLAGS and "steps" not in DECISIVE_FLAGS and "precision" not in FREE_FLAGS


def test_weights_of_something_else_are_refused_by_their_kind():
    """Their voxel size would otherwise be the first that does not fit, which says nothing."""
    described = {"kind": "sam_embed", "preprocessing": {"spacing_mm": [8.0, 8.0, 8.0]}}
    with pytest.raises(ValueError, match="--weights holds a checkpoint of kind 'sam_embed'; expected pretrained"):
        resolve_setup(described, {}, ["swin_unetr"])
    for kind in ("alice", "segmentation"):
        assert resolve_setup({"kind": kind}, {}, ["swin_unetr"]).backbone == "swin_unetr"
