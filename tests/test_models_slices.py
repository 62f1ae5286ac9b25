"""2-D networks on volumes of depth 1: parity with MONAI's, masking that hides, and who refuses slices."""

import pytest
import torch
from monai.networks.nets import SwinUNETR

from models.backbones import BACKBONES, segmentation_network
from models.backbones.interface import Backbone, upsample_mask
from models.pretrained import load_pretrained
from models.segmenters import SEGMENTERS, kind_of
from models.weights_file import WeightsFile

ROI = (1, 64, 32)
SWINS = ["swin_unetr", "swin_unetr_v2"]


def make_backbone(name: str = "swin_unetr", **options) -> Backbone:
    torch.manual_seed(0)
    return BACKBONES[name](**({"feature_size": 12, "roi": ROI, "decoder_stride": 1, "use_checkpoint": False} | options))


def slices(seed: int = 1) -> torch.Tensor:
    return torch.rand(2, 1, *ROI, generator=torch.Generator().manual_seed(seed))


def block_mask() -> torch.Tensor:
    masked = torch.zeros(2, 1, 4, 2, dtype=torch.bool)
    masked[:, 0, 1:3, 0] = True
    return masked


@pytest.mark.parametrize("name", SWINS)
def test_equals_monais_2d_network_without_a_mask_at_every_stride(name: str) -> None:
    backbone, x = make_backbone(name), slices()
    reference = SwinUNETR(1, 1, feature_size=12, spatial_dims=2, use_v2=name == "swin_unetr_v2")
    reference.load_state_dict(backbone.network.state_dict(), strict=True)
    with torch.no_grad():
        features = backbone.encode(x)
        reconstruction, decoded = backbone.decode(features)
        expected = reference(x[:, :, 0])
        for given in (reconstruction, backbone.network(x)):
            torch.testing.assert_close(given[:, :, 0], expected, rtol=1e-4, atol=1e-5)
        for given, hidden in zip(list(features.values())[:5], reference.swinViT(x[:, :, 0], True)):
            torch.testing.assert_close(given[:, :, 0], hidden, rtol=1e-4, atol=1e-5)
    for maps, channels in ((features, backbone.channels), (decoded, backbone.decoder_channels)):
        for stride, width in channels.items():
            assert maps[stride].shape == (2, width, 1, ROI[1] // stride, ROI[2] // stride)


@pytest.mark.parametrize("name", ["swin_unetr", "resnet50_unet"])
def test_masked_pixels_reach_no_output_and_visible_ones_do(name: str) -> None:
    backbone, masked = make_backbone(name).eval(), block_mask()
    hidden = upsample_mask(masked, ROI)
    x, other = slices(), slices(seed=2)
    with torch.no_grad():
        outputs = [backbone.decode(backbone.encode(v, masked))[0] for v in (x, torch.where(hidden, other, x), other)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_checkpointing_keeps_the_numbers_and_all_that_is_built_trains() -> None:
    gradients = []
    for use_checkpoint in (False, True):
        backbone = make_backbone(use_checkpoint=use_checkpoint)
        features = backbone.encode(slices(), block_mask())
        reconstruction, _ = backbone.decode(features)
        (reconstruction.square().mean() + features[32].square().mean()).backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_skips_twin_and_partial_decoder_fit_slices() -> None:
    backbone, x = make_backbone(decoder_stride=8, with_skips=True), slices()
    twin = backbone.encoder_twin()
    with torch.no_grad():
        features, theirs = backbone.encode(x), twin.encode(x)
        reconstruction, decoded = backbone.decode(features)
        skips = backbone.skips(features)
    assert reconstruction is None and sorted(decoded) == [8, 16]
    assert {s: (one.shape[1], *one.shape[2:]) for s, one in skips.items()} == {
        s: (width, 1, ROI[1] // s, ROI[2] // s) for s, width in backbone.skip_channels.items()
    }
    assert all(torch.equal(features[stride], theirs[stride]) for stride in backbone.channels)


@pytest.mark.parametrize("name", [*SWINS, "resnet50_unet"])
def test_a_2d_segmenter_takes_exported_weights(name: str) -> None:
    weights = {k: v for k, v in make_backbone(name).network.state_dict().items() if not k.startswith("out.")}
    network = SEGMENTERS[name].build(1, 3, 12, spatial_dims=2).eval()
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert unexpected == [] and missing and all(key.startswith("out.") for key in missing)
    assert kind_of(network) is SEGMENTERS[name]
    with torch.no_grad():
        assert network(slices()).shape == (2, 3, *ROI)
    SEGMENTERS[name].check_sizes(12, ROI)


def test_one_channel_weights_fill_a_2d_network_of_three() -> None:
    weights = make_backbone().network.state_dict()
    network = SEGMENTERS["swin_unetr"].build(3, 2, 12, spatial_dims=2)
    report = load_pretrained(network, WeightsFile("weights.pth", weights))
    key = "swinViT.patch_embed.proj.weight"
    assert key in report.adapted and report.share == 1
    torch.testing.assert_close(network.state_dict()[key].sum(1, keepdim=True), weights[key])


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_network_that_does_not_exist_in_so_many_dimensions_names_the_flag(name: str) -> None:
    for dims in {2, 3} - set(BACKBONES[name].spatial_dims):
        with pytest.raises(ValueError, match="--roi_z") as refused:
            segmentation_network(name, 1, 2, 12, spatial_dims=dims)
        with pytest.raises(ValueError, match="--roi_z"):
            make_backbone(name, roi=(1, 64, 64) if dims == 2 else (64, 64, 64))
        if dims == 2:
            assert all(other in str(refused.value) for other, kind in BACKBONES.items() if 2 in kind.spatial_dims)
