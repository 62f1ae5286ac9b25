"""Command lines: argparse flags whose defaults may come from a YAML file.

Every entry point builds its parser here, so that all of them behave alike: `--config FILE.yaml` sets defaults and the
command line wins, unknown YAML keys are refused, flags are never abbreviated, booleans come as `--x` / `--no-x` or
`--x true|false`, and `--print_config` shows the resolved run without starting it.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import jsonargparse

REPOSITORY = Path(__file__).resolve().parents[1]


class HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and types, keeps the line breaks of the description, and a usage that fits one line.

    The usage names what must be given and `--config`; fifty optional flags in front of every error would hide it.
    """

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        """Leave optional flags to the list below the usage."""
        shown = [
            action for action in actions if not action.option_strings or action.required or action.dest == "config"
        ]
        super().add_usage(usage, shown, [], prefix)

    def _get_type_str(self, action):
        """No type where the choices say it: jsonargparse would print the address of its check for them."""
        return None if action.choices else super()._get_type_str(action)


def make_parser(description: str) -> jsonargparse.ArgumentParser:
    """A parser with `--config` and `--print_config`; add flags with `add_argument` and `add_argument_group`.

    Args:
        description: the module's docstring; shown by `--help` as it is written.
    """
    parser = jsonargparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of flag defaults; the command line wins")
    return parser


def add_resume(group) -> None:
    """`--resume`, as `engine.checkpoint.find_wanted` understands it."""
    group.add_argument(
        "--resume",
        type=str,
        default="auto",
        help="auto = go on if OUTPUT_DIR has a checkpoint; none = begin anew, until Slurm or torchrun restarts it; or "
        "a file, until OUTPUT_DIR has a checkpoint that is further",
    )


def add_switch(group, name: str, default: bool, help: str) -> None:
    """A boolean flag: `--name`, `--no_name` and `--name true|false` all work."""
    group.add_argument(name, action=jsonargparse.ActionYesNo(), nargs="?", default=default, help=help)


def available_cpus() -> int:
    """CPU cores that this process may use: fewer than the machine has where Slurm or a cpuset grants a part."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def flags_as_dict(flags: jsonargparse.Namespace) -> dict:
    """The resolved flags as plain values (paths become text), fit for JSON, YAML and `weights_only` checkpoints."""
    plain = {key: value for key, value in flags.as_dict().items() if key != "config"}
    return json.loads(json.dumps(plain, default=str))


def git_commit() -> str:
    """The commit this code is at, with `+changes` when tracked files differ from it; `unknown` outside a clone."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """What is needed to run a command again: its resolved flags, the commit, the versions and the command line."""

    flags: dict
    commit: str
    command: str
    versions: dict
    started: str

    @classmethod
    def collect(cls, flags: jsonargparse.Namespace) -> "RunInfo":
        packages = {name: version(name) for name in ("torch", "monai", "timm")}
        return cls(
            flags=flags_as_dict(flags),
            commit=git_commit(),
            command=" ".join(sys.argv),
            versions={"python": platform.python_version()} | packages,
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def write(self, output_dir: str | Path, name: str = "run.json") -> None:
        """Write this record to `output_dir/name`, replacing an older one. Call it on rank 0 only."""
        path = Path(output_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        aside.replace(path)

    def write_beside(self, output: str | Path) -> None:
        """Write this record beside a result: `results.json` gets `results_run.json`."""
        self.write(Path(output).parent, f"{Path(output).stem}_run.json")


def run_main(main: Callable[[], None]) -> None:
    """Run an entry point; a user's mistake (`ValueError`, a missing file) ends it with one line instead of a traceback.

    Set ALICE_TRACEBACK=1 to see where the error was raised.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("ALICE_TRACEBACK"):
            raise
        raise SystemExit(f"error: {error}") from error
