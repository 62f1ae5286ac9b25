"""Every entry point: readable help, strict YAML, no abbreviations, ours wins over an installed `datasets` package."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import main_ddp
from engine.pretrain_flags import chosen_method
from engine.signals import EXIT_INTERRUPTED

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (REPOSITORY / "scripts").glob("*.py") if path.stem != "__init__")
MODULES = ["main_ddp", "extract_backbone_weights", *(f"scripts.{name}" for name in SCRIPTS)]


def parser_of(module_name: str):
    return importlib.import_module(module_name).make_flags()


@pytest.mark.parametrize("module_name", MODULES)
def test_help_names_every_flag_with_a_sentence(module_name):
    parser = parser_of(module_name)
    assert parser.description and "python" in parser.description, "the description shows a command that works"
    silent = [
        action.dest
        for action in parser._actions
        if not action.help and action.dest not in ("help", "print_config") and not action.dest.startswith("config")
    ]
    assert not silent, f"flags without help: {silent}"
    assert "<function" not in parser.format_help(), "a check's address is shown as a type"


@pytest.mark.parametrize("module_name", MODULES)
def test_unknown_keys_and_abbreviations_are_refused(module_name, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("no_such_flag: 1\n")
    with pytest.raises(SystemExit):
        parser_of(module_name).parse_args(["--config", str(config)])
    told = capsys.readouterr().err
    assert "no_such_flag" in told and len(told.splitlines()) < 10, "the mistake is not lost below a page of usage"
    with pytest.raises(SystemExit):
        parser_of(module_name).parse_args(["--no_such_flag", "1"])


@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_committed_configs_hold_known_keys(config):
    modules = {"sam": "scripts.train_sam", "finetune": "scripts.finetune_segmentation"}
    module_name = modules.get(config.name.split("_")[0], "main_ddp")
    parser = parser_of(module_name)
    if module_name == "main_ddp":
        parser = main_ddp.make_flags(chosen_method(["--config", str(config)]))
    required = [action for action in parser._actions if getattr(action, "required", False)]
    words = [word for action in required for word in (action.option_strings[0], "given")]
    flags = parser.parse_args(["--config", str(config), *words])
    assert flags is not None


@pytest.mark.parametrize("entry_point", ["main_ddp.py", "scripts/finetune_segmentation.py", "scripts/train_sam.py"])
def test_a_signal_while_importing_is_an_interruption(entry_point, tmp_path):
    """On a network disk the imports take a minute."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, entry_point], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert run.returncode == EXIT_INTERRUPTED, run.stderr


@pytest.mark.parametrize("entry_point", ["scripts/create_json.py", "main_ddp.py"])
def test_ours_wins_over_an_installed_datasets_package(entry_point, tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise ImportError('the installed package was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, entry_point, "--help"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "--json_list" in run.stdout or "--output" in run.stdout


def test_help_waits_for_no_library_of_networks():
    """They take twice as long to import as all the rest; a typing mistake should be told sooner."""
    slow = ("monai", "timm", "torchvision", "segmentation_models_pytorch", "dynamic_network_architectures")
    program = f"import sys, {', '.join(MODULES)}; print([name for name in {slow} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
