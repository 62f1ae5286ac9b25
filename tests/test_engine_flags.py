"""Flags made of dataclasses: types, choices, defaults and help, and the dataclass made of the parsed flags."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from engine.flags import (
    DeviceOptions,
    FlagChecks,
    add_options,
    flag_names,
    flags_as_dict,
    make_parser,
    options_of,
)


@dataclass(frozen=True)
class CropOptions:
    """How crops are cut.

    Attributes:
        side_vox: side of a crop, voxels,
            1 or more.
        rule: how crops are paired
        network: which network sees them
        iou_range: IoU of two crops, low high; 50% = 0.5
        strides: strides to read, voxels
        spacing_mm: voxel size in mm, one number per axis, or native; unset = the store's
        hu_min, hu_max: HU that become 0 and 1; unset = the weights'
        augment: change intensities
        num_cases: cases in the data list
    """

    side_vox: int = 96
    rule: Literal["iou", "random"] = "iou"
    network: str | None = field(default=None, metadata={"choices": ["swin", "unet"]})
    iou_range: tuple[float, float] = (0.3, 0.6)
    strides: tuple[int, ...] = field(default_factory=lambda: (8, 16))
    spacing_mm: tuple[float | str, ...] | None = None
    hu_min: float | None = None
    hu_max: "float | None" = None
    augment: bool = True
    num_cases: int = field(default=0, metadata={"flag": False})

    def __post_init__(self):
        if self.side_vox < 1:
            raise ValueError(f"--side_vox {self.side_vox}: expected 1 or more")


def make_flags(**defaults):
    parser = make_parser("Cuts crops.")
    add_options(parser.add_argument_group("Crops"), CropOptions, defaults)
    return parser


def parse(*argv: str, **defaults) -> CropOptions:
    return options_of(make_flags(**defaults).parse_args(argv), CropOptions)


def test_the_defaults_of_the_flags_are_those_of_the_dataclass():
    assert parse() == CropOptions()


def test_every_type_is_read_from_the_command_line():
    words = "--side_vox 32 --rule random --network unet --iou_range 0.1 0.2 --strides 4 8 32 --hu_min -125 --no_augment"
    options = parse(*words.split(), "--spacing_mm", "2", "1.5", "1.5")
    assert options == CropOptions(32, "random", "unet", (0.1, 0.2), (4, 8, 32), (2.0, 1.5, 1.5), -125.0, None, False)
    assert isinstance(options.hu_min, float) and isinstance(options.iou_range, tuple)
    assert parse("--spacing_mm", "native").spacing_mm == ("native",) and parse("--strides").strides == ()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--side_vox 1.5", "side_vox"),
        ("--rule sam", "rule"),
        ("--network vit", "network"),
        ("--iou_range 0.1", "iou_range"),
        ("--strides x", "strides"),
        ("--spacing_mm", "spacing_mm"),
        ("--hu_max soft", "hu_max"),
        ("--side 32", "--side"),
        ("--num_cases 3", "--num_cases"),
    ],
)
def test_other_values_are_refused(words, name, capsys):
    with pytest.raises(SystemExit):
        parse(*words.split())
    assert name in capsys.readouterr().err


def test_a_range_is_checked_by_the_dataclass():
    with pytest.raises(ValueError, match="--side_vox 0: expected 1 or more"):
        parse("--side_vox", "0")


def test_defaults_of_one_parser():
    assert parse(side_vox=64, strides=[16]) == dataclasses.replace(CropOptions(), side_vox=64, strides=(16,))
    with pytest.raises(ValueError, match="no flag sidevox"):
        make_flags(sidevox=64)


def test_yaml_goes_through_types_and_choices(tmp_path, capsys):
    config = tmp_path / "crops.yaml"
    config.write_text("side_vox: 64\nhu_min: null\nhu_max: 300\niou_range: [0.1, 0.5]\naugment: false\n")
    expected = CropOptions(side_vox=32, hu_max=300.0, iou_range=(0.1, 0.5), augment=False)
    assert parse("--config", str(config), "--side_vox", "32") == expected
    for line, name in [
        ("side_vox: many", "side_vox"),
        ("rule: sam", "rule"),
        ("iou_range: [1, x]", "iou_range"),
        ("side: 3", "side"),
        ("num_cases: 3", "num_cases"),
    ]:
        config.write_text(line + "\n")
        with pytest.raises(SystemExit):
            parse("--config", str(config))
        assert name in capsys.readouterr().err


def test_what_is_printed_can_be_read_again(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_flags().parse_args(["--hu_min", "-100", "--print_config"])
    config = tmp_path / "printed.yaml"
    config.write_text(capsys.readouterr().out)
    assert parse("--config", str(config)) == CropOptions(hu_min=-100.0)


def test_the_resolved_flags_are_plain_values():
    assert flags_as_dict(make_flags().parse_args([]))["iou_range"] == [0.3, 0.6]


def test_fields_that_are_no_flags_are_given():
    assert "num_cases" not in flag_names(CropOptions)
    assert flag_names(CropOptions)[:2] == ("side_vox", "rule")
    assert options_of(make_flags().parse_args([]), CropOptions, num_cases=5).num_cases == 5


def test_help_shows_text_type_choices_and_default():
    shown = " ".join(make_flags().format_help().split())
    for expected in [
        "Crops:",
        "side of a crop, voxels, 1 or more (type: int, default: 96)",
        "--rule {iou,random} how crops are paired (default: iou)",
        "--network {swin,unet} which network sees them (default: null)",
        "IoU of two crops, low high; 50% = 0.5 (type: float, default: [0.3, 0.6])",
        "HU that become 0 and 1; unset = the weights' (type: float",
        "change intensities (type: bool, default: True)",
    ]:
        assert expected in shown


def test_a_field_without_a_default_is_required(capsys):
    @dataclass
    class Files:
        """Files.

        Attributes:
            image: the scan
        """

        image: str

    parser = make_parser("Reads a scan.")
    add_options(parser, Files)
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "image" in capsys.readouterr().err
    assert options_of(parser.parse_args(["--image", "a.nii.gz"]), Files) == Files("a.nii.gz")


def test_a_derived_dataclass_keeps_the_texts_of_its_base():
    @dataclass(frozen=True)
    class MoreOptions(CropOptions):
        """More.

        Attributes:
            jitter_mm: distance from the match, mm
        """

        jitter_mm: float = 30.0

    parser = make_parser("Cuts crops.")
    add_options(parser, MoreOptions)
    assert options_of(parser.parse_args(["--jitter_mm", "5"]), MoreOptions).jitter_mm == 5.0


def test_a_field_that_nobody_explains_is_an_error():
    @dataclass
    class Unexplained:
        """Options.

        Attributes:
            explained: a number
        """

        explained: int = 0
        forgotten: int = 0

    with pytest.raises(ValueError, match="Unexplained.forgotten"):
        add_options(make_parser(""), Unexplained)


# Ranges


@dataclass(frozen=True)
class RateOptions:
    """Rates.

    Attributes:
        lr: peak
        min_lr: end
        steps: length; unset = for ever
    """

    lr: float = 1e-3
    min_lr: float = 0.0
    steps: int | None = None

    def __post_init__(self):
        checks = FlagChecks(self)
        checks.expect_each(lambda value: value > 0, "lr steps", "more than 0")
        checks.expect(self.min_lr <= self.lr, "min_lr lr", "an end not above the peak")
        checks.finish()


def test_all_ranges_are_reported_together():
    with pytest.raises(ValueError) as several:
        RateOptions(lr=-1.0, steps=0)
    lines = str(several.value).splitlines()
    assert lines[0] == "3 flags need a change:" and lines[1:] == [
        "  - --lr -1.0: expected more than 0",
        "  - --steps 0: expected more than 0",
        "  - --min_lr 0.0, --lr -1.0: expected an end not above the peak",
    ]
    with pytest.raises(ValueError, match="^--min_lr 1.0, --lr 0.001: expected an end not above the peak$"):
        RateOptions(min_lr=1.0)


def test_where_networks_run_is_one_group_for_every_command():
    parser = make_parser("Computes.")
    add_options(parser, DeviceOptions)
    assert options_of(parser.parse_args(["--precision", "bf16"]), DeviceOptions) == DeviceOptions("auto", "bf16")
