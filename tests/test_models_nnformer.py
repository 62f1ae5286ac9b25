"""The staged backbones, nnFormer, U-Net and ResEnc: strides, sizes, masking that hides, export, modules built."""

import copy

import pytest
import torch
from monai.networks.blocks.dynunet_block import UnetResBlock

from models.backbones import BACKBONES, segmentation_network
from models.backbones.interface import upsample_mask
from models.backbones.nnformer import NNFormerBackbone
from models.backbones.unet import NORM
from models.layers.windows import SwinBlock

SIZES = {"nnformer": (32, 16, 32), "unet": (32, 16, 32), "resenc": (64, 32, 32)}
STAGED = list(SIZES)
FEATURE_SIZES = {"resenc": 4}  # whose deepest stage is 32 times as wide
STANDARD_FEATURE_SIZE = 12


def make_backbone(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"feature_size": FEATURE_SIZES.get(name, STANDARD_FEATURE_SIZE), "roi": SIZES.get(name)}
    return BACKBONES[name](**(sizes | options))


def volumes(name: str, seed: int = 1) -> torch.Tensor:
    return torch.rand(1, 1, *SIZES[name], generator=torch.Generator().manual_seed(seed))


def block_mask() -> torch.Tensor:
    """Blocks of half a crop's depth and width, and of its whole height."""
    masked = torch.zeros(1, 2, 1, 2, dtype=torch.bool)
    masked[0, 0, 0, 1] = True
    return masked


def test_nnformer_has_the_published_sizes() -> None:
    """9.7 M parameters, stated in method section "Networks"; token widths 384 and 192 as the golden head has them."""
    backbone = NNFormerBackbone(48, (64, 64, 64))
    assert 9.7e6 <= sum(p.numel() for p in backbone.network.parameters()) < 9.8e6
    assert backbone.channels == {2: 48, 4: 96, 8: 192, 16: 384}
    assert backbone.decoder_channels == {8: 192, 4: 96, 2: 48}
    attentions = [part.attn for stage in backbone.network.encoder.values() for part in stage.blocks]
    assert [(a.num_heads, a.window) for a in attentions[::2]] == [(6, 4), (12, 4), (24, 8), (48, 4)]
    assert len(attentions) == 8


@pytest.mark.parametrize("name", STAGED)
def test_maps_have_the_announced_shapes(name: str) -> None:
    backbone = make_backbone(name)
    with torch.no_grad():
        features = backbone.encode(volumes(name), block_mask())
        reconstruction, decoded = backbone.decode(features)
    assert reconstruction.shape == (1, 1, *SIZES[name])
    for maps, channels in ((features, backbone.channels), (decoded, backbone.decoder_channels)):
        assert {s: tuple(m.shape) for s, m in maps.items()} == {
            s: (1, width, *(side // s for side in SIZES[name])) for s, width in channels.items()
        }
    assert {8, 16} <= set(backbone.channels) and backbone.channels[8] == backbone.decoder_channels[8]


@pytest.mark.parametrize("name", STAGED)
def test_masked_voxels_reach_no_output_and_visible_ones_do(name: str) -> None:
    backbone, masked = make_backbone(name), block_mask()
    hidden = upsample_mask(masked, SIZES[name])
    x, other = volumes(name), volumes(name, seed=2)
    with torch.no_grad():
        encoded = [backbone.encode(v, masked) for v in (x, torch.where(hidden, other, x), other)]
        outputs = [backbone.decode(features)[0] for features in encoded]
    assert all(torch.equal(encoded[0][stride], encoded[1][stride]) for stride in backbone.channels)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


@pytest.mark.parametrize("name", STAGED)
def test_every_masked_place_holds_the_one_token_and_it_trains(name: str) -> None:
    backbone, masked, embedded = make_backbone(name), block_mask(), []
    encode = backbone.network.encode
    backbone.network.encode = lambda x: embedded.append(x) or encode(x)
    reconstruction, _ = backbone.decode(backbone.encode(volumes(name), masked))
    hidden = upsample_mask(masked, tuple(embedded[0].shape[2:]))[0, 0]
    token = backbone.mask_token.flatten()
    assert torch.equal(embedded[0][0][:, hidden], token[:, None].expand(-1, int(hidden.sum())))
    assert not (embedded[0][0][:, ~hidden] == token[:, None]).all(0).any()
    reconstruction.square().mean().backward()
    assert backbone.mask_token.grad.abs().sum() > 0 and backbone.mask_voxel.grad.abs().sum() > 0


def centre_of_influence(token: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean place (D, H, W) of the voxels of x [1, 1, n, n, n] that a token depends on, weighted by the dependence."""
    (gradient,) = torch.autograd.grad(token @ torch.randn(len(token)), x, retain_graph=True)
    places = torch.stack(torch.meshgrid(*(torch.arange(float(side)) for side in x.shape[2:]), indexing="ij"))
    weights = gradient[0].square() / gradient.square().sum()  # [1, n, n, n]
    return (places * weights).sum(dim=(1, 2, 3))


def test_nnformer_tokens_lie_where_their_voxels_lie() -> None:
    """With attention and perceptrons silenced, convolutions alone decide what a token of either map depends on: from
    the first to the last token along an axis, that moves along this axis."""
    backbone = make_backbone("nnformer", feature_size=6, roi=(32, 32, 32), decoder_stride=8)
    for part in backbone.modules():
        if isinstance(part, SwinBlock):
            for layer in (part.attn.proj, part.mlp.fc2):
                torch.nn.init.zeros_(layer.weight)
    x = torch.rand(1, 1, 32, 32, 32).requires_grad_()
    features = backbone.encode(x)
    for above in (features[8], backbone.decode(features)[1][8]):
        first = centre_of_influence(above[0, :, 0, 0, 0], x)
        for axis in range(3):
            last = [-1 if other == axis else 0 for other in range(3)]
            moved = centre_of_influence(above[(0, slice(None), *last)], x) - first
            assert moved[axis] > 4 and moved.argmax() == axis


@pytest.mark.parametrize("name", sorted(BACKBONES.keys() - {"resnet50_unet"}))  # which is 2-D
def test_exported_weights_fill_a_segmentation_network(name: str) -> None:
    """Under the network's own names, output layer apart; the teacher's are the encoder's part of them."""
    backbone = make_backbone(name, roi=(64, 32, 32))
    feature_size = FEATURE_SIZES.get(name, STANDARD_FEATURE_SIZE)
    network = segmentation_network(name, in_channels=1, out_channels=5, feature_size=feature_size)
    prefixes = backbone.encoder_key_prefixes + backbone.decoder_key_prefixes
    weights = {key: v for key, v in backbone.network.state_dict().items() if not key.startswith("out.")}
    assert all(key.startswith(prefixes) for key in weights)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert unexpected == [] and missing and all(key.startswith("out.") for key in missing)
    teacher = set(backbone.encoder_twin().network.state_dict())
    assert teacher == {key for key in weights if key.startswith(backbone.encoder_key_prefixes)}
    volume = torch.rand(1, 1, 64, 32, 32)
    with torch.no_grad():
        assert network(volume).shape == (1, 5, 64, 32, 32)
        network.out = copy.deepcopy(backbone.network.out)
        torch.testing.assert_close(network(volume), backbone.decode(backbone.encode(volume))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STAGED)
def test_encoder_twin_gives_the_same_maps_without_mask_tokens_or_decoder(name: str) -> None:
    backbone = make_backbone(name)
    twin = backbone.encoder_twin()
    assert all(key.startswith(("network.embed.", "network.encoder.")) for key in twin.state_dict())
    ours, theirs = backbone.encode(volumes(name)), twin.encode(volumes(name))
    assert all(torch.equal(ours[stride], theirs[stride]) for stride in backbone.channels)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in backbone.parameters()}
    assert twin.decode(theirs) == (None, {})


@pytest.mark.parametrize("decoder_stride", [None, 8, 4])
@pytest.mark.parametrize("name", STAGED)
def test_builds_no_module_beyond_the_finest_map_needed(name: str, decoder_stride: int | None) -> None:
    strides = [16, 8, 4] if name == "resenc" else [8, 4]
    built = [stride for stride in strides if decoder_stride and stride >= decoder_stride]
    backbone = make_backbone(name, decoder_stride=decoder_stride)
    assert list(backbone.decoder_channels) == built and backbone.network.out is None
    reconstruction, decoded = backbone.decode(backbone.encode(volumes(name)))
    assert reconstruction is None and list(decoded) == built


@pytest.mark.parametrize("name", STAGED)
def test_activation_checkpointing_keeps_the_numbers(name: str) -> None:
    gradients = []
    for use_checkpoint in (False, True):
        backbone = make_backbone(name, use_checkpoint=use_checkpoint)
        backbone.decode(backbone.encode(volumes(name), block_mask()))[0].square().mean().backward()
        gradients.append({key: p.grad for key, p in backbone.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("nnformer", {"feature_size": 20}, "--feature_size"),
        ("unet", {"feature_size": 13}, "--feature_size"),
        ("nnformer", {"roi": (40, 32, 32)}, "--roi_x"),
        ("unet", {"roi": (24, 32, 32)}, "--roi_x"),
        ("resenc", {"feature_size": 0}, "--feature_size"),
        ("resenc", {"roi": (48, 64, 64)}, "multiples of 32 .*--roi_x"),
        ("resenc", {"roi": (32, 32, 32)}, "--roi_x.* at least 64"),
        ("nnformer", {"decoder_stride": 16}, "strides"),
    ],
)
def test_impossible_sizes_name_the_flag(name: str, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make_backbone(name, **options)


def test_pooled_features_of_the_unet_tell_samples_apart() -> None:
    """Instance-normed channels have the same mean over space in every sample; cls would know nothing."""
    torch.manual_seed(0)
    network = segmentation_network("unet", 1, 2, 12)
    crops = torch.rand(8, 1, 32, 32, 32) * torch.linspace(0.2, 1.0, 8)[:, None, None, None, None]
    crops += torch.linspace(0, 1, 32) * torch.linspace(-1, 1, 8)[:, None, None, None, None]
    with torch.no_grad():
        pooled = network.encode(network.embed(crops))[16].mean(dim=(2, 3, 4))
        network.encoder["16"] = UnetResBlock(3, 48, 96, 3, 2, NORM)
        instance_normed = network.encode(network.embed(crops))[16].mean(dim=(2, 3, 4))
    spread, spread_instance = (x.std(dim=0).mean() / x.abs().mean() for x in (pooled, instance_normed))
    assert spread > 1.3 * spread_instance, (spread, spread_instance)


def test_a_crop_of_one_deepest_token_is_fine_for_the_unet() -> None:
    assert segmentation_network("unet", 1, 2, 12)(torch.rand(1, 1, 16, 16, 16)).isfinite().all()


def test_volumes_of_other_sizes_and_unknown_names_are_refused() -> None:
    network = segmentation_network("unet", 1, 2, 12)
    with pytest.raises(ValueError, match="multiples of 16.*--roi_x"):
        network(torch.zeros(1, 1, 20, 32, 32))
    with pytest.raises(ValueError, match="--backbone"):
        segmentation_network("resnet", 1, 2, 12)
