"""The command line of main_ddp.py: its frozen names, its configs, and mistakes that are all reported together."""

from pathlib import Path

import pytest

import main_ddp
from datasets.samples.pairings import PairingOptions
from engine.flags import options_of
from engine.pretrain_flags import GROUPS, OptimiserOptions, chosen_method
from models.methods import METHODS
from tests.small_alice import small_alice

FOLDER = Path(__file__).resolve().parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith(("sam_", "finetune_")))
PUBLISHED = """
data_dir json_list output_dir embed_dir checkpoint_file batch_size lr epochs roi_x roi_y roi_z a_min a_max mask_ratio
 momentum_teacher lambda1 lambda2 lambda3 saveckp_freq num_workers use_fp16 seed
"""
OURS = """
method table_file store_dir spacing_mm pairing mask_block min_score max_cycle_mm max_spread_mm iou_range jitter_mm
augment backbone feature_size casa_variant casa_heads casa_head_dim casa_hidden_dim casa_cosine_scale query_stride
key_stride out_dim max_outside head_hidden_dim head_bottleneck_dim shared_head shared_head_teacher norm_last_layer
cls_features recon_on student_temp teacher_temp warmup_teacher_temp warmup_teacher_temp_epochs
centring centre_momentum optimizer sgd_momentum clip_each steps_per_epoch accumulate_steps lr_reference_batch
min_lr warmup_epochs weight_decay weight_decay_end clip_grad freeze_last_layer device precision use_checkpoint compile
channels_last cudnn_benchmark profile_steps
nan_policy sync_batchnorm allreduce_bf16 dist_timeout_min resume keep_freq log_freq picture_freq val_freq num_val_pairs
probe_freq probe_json_list probe_voxels probe_cases config print_config grid_bases grid_crops
lambda4 dense_variant dense_points dense_maps dense_hidden_dim dense_temp dense_near_mm dense_warmup_epochs
casa_target casa_temp casa_queries casa_normalise
help
"""


def flag_names() -> set[str]:
    options = (option for action in main_ddp.make_flags()._actions for option in action.option_strings)
    return {option.removeprefix("--") for option in options if option.startswith("--") and "no_" not in option}


def parsed(argv: list[str]):
    """The flags of a command line, read as main_ddp.py reads it."""
    return main_ddp.make_flags(chosen_method(argv)).parse_args(argv)


def check(flags, world_size: int) -> None:
    """Raise ValueError for values out of range, in whatever group of flags."""
    for Options in (*GROUPS.values(), PairingOptions, METHODS[flags.method].Options):
        options_of(flags, Options)
    options_of(flags, OptimiserOptions).peak_lr(world_size)


def test_flag_names_are_frozen():
    """Renaming a flag breaks users' job scripts: change this list only on purpose."""
    assert flag_names() == set(PUBLISHED.split()) | set(OURS.split())


def test_every_flag_has_help():
    for action in main_ddp.make_flags()._actions:
        assert action.help, action.option_strings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_parse_and_hold_no_mistake(path):
    check(parsed(["--config", str(path)]), world_size=8)


def test_the_published_recipe_centres_crops_at_its_matches():
    options = options_of(parsed(["--config", str(FOLDER / "alice_published.yaml")]), PairingOptions)
    assert (options.min_score, options.jitter_mm, options.max_outside) == (0.7, 0, 1)


def test_command_line_wins_over_the_config(tmp_path):
    (tmp_path / "run.yaml").write_text("batch_size: 3\nlr: 0.5\n")
    flags = main_ddp.make_flags().parse_args(["--config", str(tmp_path / "run.yaml"), "--lr", "0.25"])
    assert (flags.batch_size, flags.lr) == (3, 0.25)


@pytest.mark.parametrize(
    "content", [b"lr: : 2\n", b"lr: !!python/object/apply:os.getcwd []\n", b"\xff\xfe\0", b"[" * 50_000]
)
def test_a_config_that_is_no_yaml_of_plain_values_is_refused(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"--config .*run.yaml: not a YAML file of flags"):
        main_ddp.main(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("text", ["batch_sice: 3\n", "batch_size: three\n", "pairing: by_name\n"])
def test_unknown_keys_and_wrong_values_in_a_config_are_refused(tmp_path, text, capsys):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main_ddp.make_flags().parse_args(["--config", str(tmp_path / "run.yaml")])
    assert text.split(":")[0] in capsys.readouterr().err


def test_all_mistakes_are_reported_together_before_anything_is_written(tmp_path):
    argv = [
        f"--data_dir={tmp_path}", f"--json_list={tmp_path / 'absent.json'}", f"--output_dir={tmp_path / 'out'}",
        "--pairing=iou", "--roi_x=50", "--a_min=300", "--mask_ratio=1.5", "--batch_size=0", "--lr=1e-5",
        "--min_lr=1e-3", "--spacing_mm", "2", "2", "--device=cpu", "--precision=fp16",
        "--iou_range", "0.9", "0.1", "--student_temp=0",
    ]  # fmt: skip
    with pytest.raises(ValueError) as error:
        main_ddp.main(argv)
    told = str(error.value)
    flags = "json_list roi_x a_min batch_size min_lr spacing_mm precision iou_range student_temp"
    for flag in flags.split():
        assert f"--{flag}" in told, flag
    assert "flags need a change" in told and not (tmp_path / "out").exists()


def test_floor_above_the_peak_is_an_error_that_knows_the_scaling():
    """The published command: 5e-5 x 64 / 256 = 1.25e-5 peak, floor 1e-4."""
    argv = ["--lr=5e-5", "--min_lr=1e-4", "--lr_reference_batch=256", "--batch_size=8"]
    with pytest.raises(ValueError, match=r"--min_lr .*1\.25e-05 .*effective batch 64"):
        check(parsed(argv), world_size=8)
    check(parsed([*argv, "--min_lr=1e-6"]), world_size=8)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], 0.4),
        (["--weight_decay=0.1"], 0.4),
        (["--weight_decay=0"], 0),
        (["--weight_decay=0", "--weight_decay_end=0.2"], 0.2),
        (["--weight_decay_end=0"], 0),
    ],
)
def test_weight_decay_0_is_off_until_the_end(argv, expected):
    flags = parsed(argv)
    check(flags, world_size=1)
    assert options_of(flags, OptimiserOptions).weight_decay_end == expected
    method = small_alice()
    decay = main_ddp.make_schedules(flags, method, 10 * flags.epochs, 10, world_size=1)["weight_decay"]
    assert decay(10 * flags.epochs) == expected and decay(0) == pytest.approx(flags.weight_decay)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("weight_decay_end", "-1", "--weight_decay_end -1.0: expected 0 (off) or more"),
        ("batch_size", "0", "--batch_size 0: expected 1 or more"),
        ("steps_per_epoch", "-1", "--steps_per_epoch -1: expected 0 (off) or more"),
        ("lr", "0", "--lr 0.0: expected more than 0"),
        ("seed", "-1", "--seed -1: expected 0 (off) or more"),
        ("num_workers", "-1", "--num_workers -1: expected 0 (off) or more"),
        ("log_freq", "0", "--log_freq 0: expected 1 or more"),
        ("dist_timeout_min", "0", "--dist_timeout_min 0.0: expected more than 0"),
        ("probe_voxels", "0", "--probe_voxels 0: expected 1 or more"),
        ("sgd_momentum", "1", "--sgd_momentum 1.0: expected a momentum from 0 to below 1"),
    ],
)
def test_values_out_of_range_are_refused_by_name(flag, value, message):
    with pytest.raises(ValueError) as error:
        check(parsed([f"--{flag}={value}"]), world_size=1)
    assert str(error.value) == message


def test_a_warm_up_longer_than_the_run_and_two_number_formats_are_refused():
    with pytest.raises(ValueError, match="--warmup_epochs 11.0, --epochs 10: expected a warm-up no longer"):
        check(parsed(["--warmup_epochs=11", "--epochs=10"]), world_size=1)
    with pytest.raises(ValueError, match="--use_fp16 True, --precision bf16: expected one number format"):
        check(parsed(["--use_fp16", "--precision=bf16"]), world_size=1)


@pytest.mark.parametrize(
    ("backbone", "mask_block", "is_right"),
    [("swin_unetr", 3, False), ("nnformer", 3, False), ("unet", 3, True), ("swin_unetr", 2, True)],
)
def test_mask_blocks_that_cut_tokens_are_refused_before_anything_is_written(tmp_path, backbone, mask_block, is_right):
    argv = [f"--backbone={backbone}", f"--mask_block={mask_block}", "--feature_size=12", "--head_hidden_dim=8"]
    argv += [f"--data_dir={tmp_path}", f"--json_list={tmp_path / 'absent.json'}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError) as error:
        main_ddp.main([*argv, "--pairing=iou", "--device=cpu"])
    assert (f"--mask_block 3 cuts through the tokens of --backbone {backbone}" in str(error.value)) is not is_right
    assert not (tmp_path / "out").exists()


def test_missing_table_names_the_two_commands(tmp_path):
    (tmp_path / "list.json").write_text("{}")
    argv = [f"--data_dir={tmp_path}", f"--json_list={tmp_path / 'list.json'}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match="generate_sam_embeddings.py.*mine_pairs.py.*--pairing iou"):
        main_ddp.main([*argv, f"--embed_dir={tmp_path}", "--feature_size=12", "--device=cpu"])
    with pytest.raises(ValueError, match="--embed_dir is not given"):
        main_ddp.main([*argv, "--feature_size=12", "--device=cpu"])
