"""The SwinUNETR backbone: parity with MONAI, masking that hides, and the modules that are built."""

import pytest
import torch
from monai.networks.nets import SwinUNETR

from models.backbones.interface import upsample_mask
from models.backbones.swin_unetr import SwinUNETRBackbone

UNEQUAL = (64, 32, 32)


def make_backbone(**options) -> SwinUNETRBackbone:
    torch.manual_seed(0)
    return SwinUNETRBackbone(feature_size=12, **({"roi": UNEQUAL} | options))


def volumes(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 1, *UNEQUAL, generator=torch.Generator().manual_seed(seed))


def block_mask() -> torch.Tensor:
    masked = torch.zeros(1, 4, 2, 2, dtype=torch.bool)
    masked[0, 1:3, :, 0] = True
    return masked


def test_equals_monai_without_a_mask_at_every_stride() -> None:
    backbone = make_backbone()
    reference = SwinUNETR(1, 1, feature_size=12)
    reference.load_state_dict(backbone.network.state_dict(), strict=True)
    x = volumes(1)
    with torch.no_grad():
        features = backbone.encode(x)
        reconstruction, decoded = backbone.decode(features)
        torch.testing.assert_close(reconstruction, reference(x), rtol=1e-4, atol=1e-5)
    for stride, width in backbone.channels.items():
        assert features[stride].shape == (1, width, *(side // stride for side in UNEQUAL))
    for stride, width in backbone.decoder_channels.items():
        assert decoded[stride].shape == (1, width, *(side // stride for side in UNEQUAL))
    assert backbone.channels == {2: 12, 4: 24, 8: 48, 16: 96, 32: 192}


def test_masked_voxels_reach_no_output_and_visible_ones_do() -> None:
    backbone, masked = make_backbone(), block_mask()
    hidden = upsample_mask(masked, UNEQUAL)
    x, other = volumes(1), volumes(1, seed=2)
    with torch.no_grad():
        outputs = [backbone.decode(backbone.encode(v, masked))[0] for v in (x, torch.where(hidden, other, x), other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_mask_token_and_mask_voxel_change_the_output_and_train() -> None:
    backbone, masked = make_backbone(), block_mask()
    reconstruction, _ = backbone.decode(backbone.encode(volumes(1), masked))
    reconstruction.square().mean().backward()
    assert backbone.mask_token.grad.abs().sum() > 0 and backbone.mask_voxel.grad.abs().sum() > 0


def test_block_masks_differ_along_every_axis() -> None:
    """Masks are 3-D blocks, not columns: each block lands on its own voxels."""
    masked = torch.zeros(1, 2, 3, 4, dtype=torch.bool)
    masked[0, 1, 2, 0] = True
    fine = upsample_mask(masked, (4, 9, 16))
    expected = torch.zeros(1, 1, 4, 9, 16, dtype=torch.bool)
    expected[0, 0, 2:4, 6:9, 0:4] = True
    assert torch.equal(fine, expected)


@pytest.mark.parametrize(
    ("decoder_stride", "absent"),
    [
        (None, {"encoder1", "encoder2", "encoder3", "encoder4", "encoder10", "decoder5", "decoder1", "out"}),
        (8, {"encoder1", "encoder2", "encoder3", "decoder3", "decoder2", "decoder1", "out"}),
        (1, set()),
    ],
)
def test_builds_no_module_beyond_the_finest_map_needed(decoder_stride: int | None, absent: set) -> None:
    backbone = make_backbone(decoder_stride=decoder_stride)
    built = {name for name, _ in backbone.network.named_children()}
    everything = {name for name, _ in SwinUNETR(1, 1, feature_size=12).named_children()}
    assert not absent & built
    if decoder_stride == 1:
        assert built == everything
    prefixes = backbone.encoder_key_prefixes + backbone.decoder_key_prefixes + ("out.",)
    assert all(name.startswith(prefixes) for name in backbone.network.state_dict())


def test_encoder_twin_holds_every_encoder_key_and_gives_the_same_maps() -> None:
    backbone = make_backbone()
    twin = backbone.encoder_twin()
    encoder = {k for k in backbone.network.state_dict() if k.startswith(backbone.encoder_key_prefixes)}
    assert set(twin.network.state_dict()) == encoder and set(twin.state_dict()) == {f"network.{k}" for k in encoder}
    x = volumes(1)
    with torch.no_grad():
        ours, theirs = backbone.encode(x), twin.encode(x)
    assert set(theirs) == {2, 4, 8, 16, 32}
    assert all(torch.equal(ours[stride], theirs[stride]) for stride in theirs)


def test_activation_checkpointing_keeps_the_numbers() -> None:
    gradients = []
    for use_checkpoint in (False, True):
        backbone = make_backbone(use_checkpoint=use_checkpoint)
        reconstruction, _ = backbone.decode(backbone.encode(volumes(1), block_mask()))
        reconstruction.square().mean().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"feature_size": 20}, "--feature_size"),
        ({"roi": (64, 40, 32)}, "--roi_x"),
        ({"roi": (32, 32, 32)}, "--roi_x"),
        ({"roi": (64, 32)}, "--roi_x"),
        ({"roi": (1, 40, 64)}, "--roi_x"),
        ({"roi": (1, 32, 32)}, "--roi_x"),
    ],
)
def test_impossible_sizes_name_the_flag(options: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        SwinUNETRBackbone(**({"feature_size": 12, "roi": UNEQUAL} | options))


def test_one_token_is_enough_without_a_decoder() -> None:
    assert SwinUNETRBackbone(12, (32, 32, 32), decoder_stride=None).decoder_channels == {}


def test_a_mask_that_does_not_fit_names_the_flag() -> None:
    with pytest.raises(ValueError, match="--mask_block"):
        upsample_mask(torch.zeros(1, 3, 2, 2, dtype=torch.bool), (32, 16, 16))
