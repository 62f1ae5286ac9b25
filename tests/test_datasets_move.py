"""Moved views: zoomed, mirrored and turned crops, in slices and in volumes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.samples import move
from datasets.samples.augment import AugmentOptions, ViewAugmenter
from datasets.samples.crops import CropOptions
from datasets.samples.move import ViewMover
from engine.pretrain_flags import chosen_method, make_pretrain_flags
from models.backbones import BACKBONES
from models.methods import METHODS
from tests.fakes import make_dataset

VIEWS = {"view": "moved"}
PLAIN = CropOptions(augment=False)
SMALL = {
    "simsiam": {"projector_hidden_dim": 8, "projector_dim": 8, "predictor_dim": 4},
    "dino": {"out_dim": 8, "head_hidden_dim": 8, "head_bottleneck_dim": 4},
}


def make_backbone(decoder_stride: int | None, with_masks: bool = False, with_skips: bool = False):
    return BACKBONES["unet"](4, (32, 32, 32), decoder_stride, False, with_masks, with_skips)


def poses(crop: torch.Tensor) -> list[torch.Tensor]:
    """A crop [1, D, H, W] in every pose that mirrors and turns within the slice can give it."""
    mirrors = [axes for num in range(3) for axes in itertools.combinations((1, 3), num)]
    return [crop.flip(axes).rot90(turns, (2, 3)) for axes in mirrors for turns in range(4)]


@pytest.mark.parametrize("roi, num_poses", [((1, 16, 16), 8), ((16, 16, 16), 16)])
def test_every_pose_appears_and_no_other(monkeypatch, roi, num_poses):
    monkeypatch.setattr(move, "ZOOM_PROB", 0.0)
    dataset = make_dataset("iou", roi=roi, views=VIEWS, crops=PLAIN)
    seen = set()
    for index in range(60):
        sample = dataset[index]
        for crop, view in zip(sample["crop"], sample["view"]):
            found = [pose for pose, other in enumerate(poses(crop)) if torch.equal(view, other)]
            assert found, "the view is no pose of its crop"
            seen.add(found[0])
    assert len(seen) == num_poses


@pytest.mark.parametrize("roi", [(1, 24, 24), (24, 24, 24)])
def test_zooms_keep_size_and_centre_and_fill_with_air(monkeypatch, roi):
    for name in ("MIRROR_PROB", "TURN_PROB"):
        monkeypatch.setattr(move, name, 0.0)
    monkeypatch.setattr(move, "ZOOM_PROB", 1.0)
    mover = ViewMover(roi)
    widths = []
    for seed in range(30):
        moved = mover.make(torch.ones(1, *roi), mover.draw(np.random.RandomState(seed))).numpy()
        assert moved.shape == (1, *roi) and moved.max() > 0.999
        rim = [moved.take(0, axis) for axis in ((2, 3) if roi[0] == 1 else (1, 2, 3))]
        is_smaller = [bool((side == 0).all()) for side in rim]
        assert len(set(is_smaller)) == 1, "one factor for all axes"
        widths.append(int((moved[0, roi[0] // 2, 12] > 0).sum()))
    assert 19 <= min(widths) <= 21 and max(widths) == 24  # 0.8 x 24 = 19.2


def test_views_depend_on_seed_and_index_alone():
    first, again = (make_dataset("iou", roi=(1, 16, 16), views=VIEWS, seed=3) for _ in range(2))
    for index in (4, 0, 4):
        torch.testing.assert_close(first[index]["view"], again[index]["view"], rtol=0, atol=0)
    one = first[4]
    assert not torch.equal(one["view"][0], one["view"][1])
    augmented = make_dataset("iou", roi=(1, 16, 16), views={"view": "augmented"}, seed=3)[4]
    torch.testing.assert_close(one["crop"], augmented["crop"], rtol=0, atol=0)


def test_intensities_follow_the_move():
    hu = np.zeros((1, 16, 16), np.int16)
    hu[:, :8] = 200
    options = AugmentOptions(window_prob=0, gamma_prob=0, blur_prob=0, noise_prob=0, contrast_prob=0, brightness_prob=1)
    moved = ViewAugmenter(options, -100, 250, ViewMover((1, 16, 16)))
    views = [moved(hu, np.random.SeedSequence(seed)) for seed in range(20)]
    assert any(view.min() > 0.01 for view in views)  # the zoom's rim is 0 before the shift, and lighter after it
    assert all(view.shape == (1, 1, 16, 16) for view in views)


def test_slices_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match="--move_views .*--roi_y as --roi_x, received 16 and 24"):
        make_dataset("iou", roi=(1, 16, 24), views=VIEWS)


@pytest.mark.parametrize("name", ["simsiam", "dino"])
def test_the_published_protocol_in_slices_moves_views(name):
    flags = make_pretrain_flags("", name).parse_args(["--config", f"configs/{name}_iou_2d.yaml"])
    assert flags.move_views
    for is_moved, kind in ((True, "moved"), (False, "augmented")):
        options = replace(METHODS[name].Options(**SMALL[name]), move_views=is_moved)
        assert METHODS[name](options, make_backbone).views == {"view": kind}


def test_other_methods_refuse_the_flag():
    with pytest.raises(ValueError, match="--move_views is a flag of --method simsiam or dino; .* --method voco"):
        chosen_method(["--method=voco", "--move_views=true"])
