"""`load_pretrained(model, path)`: weights into a network by name and shape, with a report, never silently in vain.

The habit elsewhere is `load_state_dict(..., strict=False)`, which loads nothing at all when the names differ by a
prefix, and says so to nobody. Here the spelling is found out, every key is accounted for, and too small a share fails.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from models.segmenters import kind_of
from models.weights_file import WeightsError, WeightsFile, check_finite, read_weights_file

PARTS = {"encoder": "encoder", "whole": "whole network"}
# What training code puts around a network: DDP, torch.compile, Lightning, our students and teachers, others' wrappers.
# encoder_q is MoCo's and CAiD's student; their encoder_k, a moving average, is left alone.
WRAPPERS = re.compile(r"^(?:module|_orig_mod|model|network|net|backbone|student|teacher|segmenter|encoder_q)\.")
# Modules of other projects' training that our students have too: pattern -> our name.
PUBLISHED_HEADS = {
    re.compile(r"^(?:module\.)*(?:student\.)?(?:proj_head\.)?(layer[123]\.0\.(?:weight|bias))$"): r"head.\1",  # VoCo
    re.compile(r"^(?:module\.)*(?:encoder_q\.)?fc\.([02]\.(?:weight|bias))$"): r"head.\1",  # CAiD
    re.compile(r"^(?:module\.)*(?:encoder_q\.)?(?:backbone\.)?segmentation_head\."): "backbone.network.out.",  # CAiD
}
# The encoder of MONAI's masked image modelling (ssl_pretrained_weights.pth) -> SwinUNETR's: it nests stages once more.
MASKED_MODELLING = re.compile(r"^encoder\.(?:(patch_embed\.)|(layers[1-4]\.0\.)0\.)")
VERSION_2 = re.compile(r"^swinViT\.layers[1-4]c\.")  # what SwinUNETR-V2 has and SwinUNETR lacks


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of the network's wanted part, and of the file's others.

    Attributes:
        loaded: the keys that now hold the file's values.
        adapted: those of them whose input channels were spread or summed, see `fit_input_channels`.
        missing: wanted by the network, not in the file; they keep their random values.
        misshapen: "name (file's shape) for (network's shape)"; they keep their random values.
        unexpected: of the file, not wanted.
        beside: loaded into modules that are not the network (heads, mask tokens).
        description: what the file says about itself (preprocessing, backbone, ...).
    """

    path: str
    part: str
    loaded: list[str]
    adapted: list[str]
    missing: list[str]
    misshapen: list[str]
    unexpected: list[str]
    description: dict = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)

    def counts(self, prefixes: tuple[str, ...] = ("",)) -> tuple[int, int]:
        """(loaded, wanted) of the network's keys that start with one of `prefixes`."""
        loaded = sum(key.startswith(prefixes) for key in self.loaded)
        return loaded, loaded + sum(key.startswith(prefixes) for key in self.missing + self.misshapen)

    @property
    def share(self) -> float:
        """Loaded keys over wanted keys, 0 to 1."""
        loaded, wanted = self.counts()
        return loaded / max(1, wanted)

    def describe(self) -> str:
        """One line for people."""
        loaded, wanted = self.counts()
        text = f"{self.path}: {loaded} of {wanted} keys of the {PARTS[self.part]} loaded"
        if self.beside:
            text += f", and {len(self.beside)} beside it ({', '.join(self.beside[:2])}, ...)"
        for name in ("adapted", "missing", "misshapen", "unexpected"):
            keys = getattr(self, name)
            if keys:
                text += f"; {len(keys)} {name} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"
        return text


def load_pretrained(
    model: nn.Module, path: str | Path | WeightsFile, min_share: float = 0.9, part: str = "encoder"
) -> LoadReport:
    """Load what a file holds for `model`, or fail.

    Args:
        model: the network; its output layer (whose shape depends on the classes) is never loaded from another task.
        path: any file that `models.weights_file` reads, or what it read.
        min_share: least share of the part's keys, 0 to 1, that must be loaded.
        part: "encoder", or "whole" for encoder and decoder. Keys of the file outside of the part are left alone.

    Returns:
        The report; the model then holds the weights.

    Raises:
        WeightsError: an unreadable file, 2-D weights for a 3-D network or the reverse, another version of SwinUNETR,
            less than `min_share` fits, two tensors of the file stand for one weight, or values are not finite; the
            model is then untouched.
        ValueError: an unknown part, or a network of which nobody knows what its encoder is.
    """
    file = path if isinstance(path, WeightsFile) else read_weights_file(path)
    own = model.state_dict()
    wanted = wanted_keys(model, own, part)
    given = best_spelling(file, own)
    found = {key: fit_input_channels(given[key], own[key]) for key in wanted if key in given}
    fitting = {key: tensor for key, tensor in found.items() if tensor is not None}
    shapes = {key: (tuple(given[key].shape), tuple(own[key].shape)) for key in found}
    report = LoadReport(
        path=file.path,
        part=part,
        loaded=list(fitting),
        adapted=[key for key in fitting if shapes[key][0] != shapes[key][1]],
        missing=[key for key in wanted if key not in given],
        misshapen=[f"{key} {shapes[key][0]} for {shapes[key][1]}" for key in found if key not in fitting],
        unexpected=[key for key in given if key not in wanted],
        description=file.description,
    )
    check_dimensions(file, {(given[key].ndim - 2, own[key].ndim - 2) for key in found})
    check_version(report)
    if report.share < min_share or not fitting:
        advice = "Does the network (--backbone, --feature_size) equal the one that the weights are for?"
        encoder = wanted_keys(model, own, "encoder") if part == "whole" and kind_of(model) is not None else []
        if encoder and set(report.loaded) == set(encoder) and not report.misshapen:
            advice = "The file holds an encoder only: load it with --weights_part encoder"
        raise WeightsError(
            f"{report.describe()}: that is {report.share:.0%}, less than the {min_share:.0%} that must fit. {advice}"
        )
    check_finite(fitting, file.path)
    model.load_state_dict(own | fitting)
    return report


def check_dimensions(file: WeightsFile, pairs: set[tuple[int, int]]) -> None:
    """Raise WeightsError where convolutions of the file are 2-D and the network's 3-D, or the reverse.

    Args:
        pairs: spatial axes of a tensor in the file and in the network.
    """
    mixed = pairs & {(2, 3), (3, 2)}
    if mixed:
        given, wanted = mixed.pop()
        roi = file.description.get("preprocessing", {}).get("roi")
        crops = "" if roi is None else f" (pretrained with crops of {' x '.join(map(str, roi))} voxels, D H W)"
        need = "2-D weights need --roi_z 1, and 3-D weights need a --roi_z above 1"
        raise WeightsError(f"{file.path}: the weights are {given}-D{crops}, and the network is {wanted}-D; {need}")


def check_version(report: LoadReport) -> None:
    """Raise WeightsError where only one of file and network is SwinUNETR-V2: most of their names agree."""
    is_file_2 = any(VERSION_2.match(key) for key in report.loaded + report.unexpected)
    is_network_2 = any(VERSION_2.match(key) for key in report.loaded + report.missing)
    if is_file_2 == is_network_2 or not any(key.startswith("swinViT.") for key in report.loaded):
        return
    versions = {False: "SwinUNETR (--backbone swin_unetr)", True: "SwinUNETR-V2 (--backbone swin_unetr_v2)"}
    raise WeightsError(
        f"{report.path}: the weights are of {versions[is_file_2]}, the network is {versions[is_network_2]}"
    )


def wanted_keys(model: nn.Module, own: dict[str, Tensor], part: str) -> list[str]:
    """The network's keys that a file should have: those of the encoder, or all but the output layer's."""
    if part not in PARTS:
        raise ValueError(f"part is {part!r}, expected one of {', '.join(PARTS)}")
    kind = kind_of(model)
    if kind is None and part == "encoder":
        raise ValueError(
            f"{type(model).__name__} is not among models.segmenters.SEGMENTERS, so its encoder is unknown; "
            "pass part='whole'"
        )
    if part == "encoder":
        return [key for key in own if key.startswith(kind.encoder_key_prefixes)]
    return [key for key in own if kind is None or not key.startswith(kind.output_key_prefixes)]


def best_spelling(file: WeightsFile, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors under the spelling that meets most of the network's names.

    Raises:
        WeightsError: different tensors get the name of one weight: the file holds two networks.
    """
    spellings: list[Callable[[str], str]] = [
        lambda name: name,
        unwrapped,
        lambda name: published_names(unwrapped(name)),
        lambda name: "swinViT." + published_names(unwrapped(name)),  # MONAI's own pretraining keeps the bare encoder
        lambda name: "encoder." + unwrapped(name),  # torchvision's ResNet, the encoder of segmentation_models_pytorch
    ]
    spell = max(spellings, key=lambda spell: len(own.keys() & {spell(name) for name in file.tensors}))
    names: dict[str, str] = {}
    for name, tensor in file.tensors.items():
        first = names.setdefault(spell(name), name)
        if first != name and spell(name) in own and not torch.equal(file.tensors[first], tensor):
            raise WeightsError(
                f"{file.path}: {first} and {name} are different tensors for one weight of the network: the file holds "
                "two networks; choose with --checkpoint_key student or teacher, or save the wanted one alone"
            )
    return {key: file.tensors[name] for key, name in names.items()}


def unwrapped(name: str) -> str:
    """A key without what was wrapped around the network, however often."""
    while WRAPPERS.match(name):
        name = WRAPPERS.sub("", name, count=1)
    return name


def published_names(name: str) -> str:
    """The names of MONAI's SwinUNETR for those that older published weights use."""
    name = MASKED_MODELLING.sub(r"swinViT.\1\2", name)
    return name.replace("swin_vit.", "swinViT.").replace("mlp.fc1.", "mlp.linear1.").replace("mlp.fc2.", "mlp.linear2.")


def own_head_name(name: str) -> str:
    """Our student's name for a head of VoCo's (either version) or CAiD's files; any other name as it is."""
    for pattern, ours in PUBLISHED_HEADS.items():
        if pattern.match(name):
            return pattern.sub(ours, name)
    return name


def fit_input_channels(given: Tensor, own: Tensor) -> Tensor | None:
    """`given` where its shape is the network's; a convolution of one input channel for N or of N for one; else None.

    From one to N, every channel gets the weights divided by N, from N to one they are summed: N equal channels give
    what one channel gives.
    """
    if given.shape == own.shape:
        return given
    is_convolution = given.ndim == own.ndim and own.ndim in (4, 5)
    if not is_convolution or given.shape[0] != own.shape[0] or given.shape[2:] != own.shape[2:]:
        return None
    if given.shape[1] == 1:
        return given.expand_as(own) / own.shape[1]
    return given.sum(1, keepdim=True) if own.shape[1] == 1 else None
