"""Command lines: argparse flags whose defaults may come from a YAML file.

Every entry point builds its parser here, so that all of them behave alike: `--config FILE.yaml` sets defaults and the
command line wins, unknown YAML keys are refused, flags are never abbreviated, booleans come as `--x` / `--no-x` or
`--x true|false`, and `--print_config` shows the resolved run without starting it.

A dataclass can be a group of flags: `add_options` makes a flag of every field, `options_of` makes the dataclass from
the parsed flags. A flag's type, default, range (`__post_init__`) and meaning then stand in one place.
"""

import argparse
import dataclasses
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import jsonargparse

REPOSITORY = Path(__file__).resolve().parents[1]

T = typing.TypeVar("T")


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


def add_switch(group, name: str, default: bool | None, help: str) -> None:
    """A boolean flag: `--name`, `--no_name` and `--name true|false` all work."""
    group.add_argument(name, action=jsonargparse.ActionYesNo(), nargs="?", default=default, help=help)


def add_options(group, Options: type, defaults: dict[str, typing.Any] | None = None) -> None:
    """Add a flag `--name` for every field of a dataclass; `options_of` makes the dataclass from the parsed flags.

    A flag takes its type from the field's annotation and its help from the "Attributes" section of the docstring:

    - `int`, `float`, `str`, and these `| None`: one value, where YAML's `null` is None;
    - `bool`, `bool | None`: a switch, see `add_switch`;
    - `Literal["a", "b"]`, or a field with `metadata={"choices": [...]}`: one of these;
    - `tuple[float, float]`: two values; `tuple[float, ...]`: any number of values, one or more where it is `| None`.

    A field without a default becomes a required flag. A field with `metadata={"flag": False}` becomes none.

    Args:
        group: a parser, or an argument group of it.
        Options: the dataclass.
        defaults: name -> value, for fields whose default is another one in this parser.

    Raises:
        ValueError: the docstring does not say what a field means, or `defaults` names something else than a flag.
    """
    defaults = defaults or {}
    unknown = sorted(set(defaults) - set(flag_names(Options)))
    if unknown:
        raise ValueError(
            f"{Options.__name__} has no flag {', '.join(unknown)}; it has {', '.join(flag_names(Options))}"
        )
    annotations, texts = typing.get_type_hints(Options), attribute_texts(Options)
    for field in flag_fields(Options):
        if field.name not in texts:
            raise ValueError(f"{Options.__name__}.{field.name}: the docstring's Attributes section does not explain it")
        default = defaults.get(field.name, default_of(field))
        if annotations[field.name] in (bool, bool | None):
            add_switch(group, f"--{field.name}", default, texts[field.name])
            continue
        keywords = flag_type(annotations[field.name])
        if "choices" in field.metadata:
            keywords |= {"type": str, "choices": list(field.metadata["choices"])}
        given = {"required": True} if default is dataclasses.MISSING else {"default": default}
        group.add_argument(f"--{field.name}", **keywords, **given, help=texts[field.name])


def options_of(flags: jsonargparse.Namespace, Options: type[T], **given) -> T:
    """The dataclass `Options` with the values of its flags; `given` are values of further fields.

    Raises:
        ValueError: from `Options.__post_init__`, for values out of range.
    """
    annotations = typing.get_type_hints(Options)
    values = {name: getattr(flags, name) for name in flag_names(Options)}
    for name, value in values.items():
        if isinstance(value, list) and typing.get_origin(without_none(annotations[name])) is tuple:
            values[name] = tuple(value)
    return Options(**(values | given))


def flag_names(Options: type) -> tuple[str, ...]:
    """The names of the flags that `add_options` makes of a dataclass."""
    return tuple(field.name for field in flag_fields(Options))


def flag_fields(Options: type) -> list[dataclasses.Field]:
    """The fields of a dataclass that are flags."""
    return [field for field in dataclasses.fields(Options) if field.metadata.get("flag", True)]


def default_of(field: dataclasses.Field):
    """A field's default as a flag has it (tuples become lists, as in YAML); MISSING where there is none."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return list(value) if isinstance(value, tuple) else value


def flag_type(annotation) -> dict:
    """The keywords of `add_argument` for an annotation."""
    plain = without_none(annotation)
    origin, parts = typing.get_origin(plain), typing.get_args(plain)
    if origin is typing.Literal:
        return {"type": type(parts[0]), "choices": list(parts)}
    if origin is tuple:
        any_number = "*" if plain is annotation else "+"  # where None means unset, an empty tuple means nothing
        return {"type": parts[0], "nargs": any_number if parts[-1] is Ellipsis else len(parts)}
    return {"type": annotation}


def without_none(annotation):
    """`X` for `X | None`; any other annotation as it is."""
    parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.Union[tuple(parts)] if is_union else annotation  # noqa: UP007 (a union of a list of types)


def attribute_texts(Options: type) -> dict[str, str]:
    """Name -> text of the "Attributes" sections of a class and its bases; lines are joined, the last full stop goes."""
    texts = {}
    for kind in reversed(Options.__mro__):
        document = inspect.cleandoc(vars(kind).get("__doc__") or "")
        section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)*)", document, re.MULTILINE)
        entries = textwrap.dedent(section[1]) if section else ""
        for names, text in re.findall(r"^(\w+(?:, \w+)*):(.*(?:\n[ \t]+.*)*)", entries, re.MULTILINE):
            texts |= dict.fromkeys(names.split(", "), " ".join(text.split()).removesuffix("."))
    return texts


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """Where and in which number format networks run; see `engine.device.pick_device` and `pick_precision`.

    Attributes:
        device: auto = CUDA where there is one
        precision: auto = bf16 on CUDA that has it, else fp32
    """

    device: typing.Literal["auto", "cpu", "cuda"] = "auto"
    precision: typing.Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class FlagChecks:
    """Collects the mistakes in the values of flags, so that `finish` reports all of them in one error.

    Args:
        options: has the flags as attributes.
    """

    def __init__(self, options: object) -> None:
        self.options = options
        self.problems: list[str] = []

    def expect(self, is_right: bool, names: str, expected: str) -> None:
        """Note the flags `names` (separated by spaces) with their values unless `is_right`."""
        if not is_right:
            received = ", ".join(f"--{name} {getattr(self.options, name)}" for name in names.split())
            self.problems.append(f"{received}: expected {expected}")

    def expect_each(self, is_right: Callable[[float], bool], names: str, expected: str) -> None:
        """`expect` for each flag of `names` alone; None (unset) is right."""
        for name in names.split():
            value = getattr(self.options, name)
            self.expect(value is None or is_right(value), name, expected)

    def finish(self) -> None:
        """Raise FlagError with all mistakes, if there are any."""
        if self.problems:
            raise FlagError(self.problems)


class FlagError(ValueError):
    """Mistakes in flags, all of them in one message; `problems` holds a line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        num = len(self.problems)
        lines = "\n  - ".join([f"{num} flags need a change:", *self.problems])
        super().__init__(self.problems[0] if num == 1 else lines)


def check_all(checks: Iterable[Callable[[], object]]) -> None:
    """Run every check, and report the mistakes of all of them in one error.

    Args:
        checks: functions that raise ValueError.

    Raises:
        FlagError: lists all of them.
    """
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except ValueError as error:
            problems += getattr(error, "problems", [str(error)])
    if problems:
        raise FlagError(problems)


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

    Every process of torchrun finds mistakes in flags, and one on each machine tells them. Set ALICE_TRACEBACK=1 to see
    where the error was raised.
    """
    # Of libraries, about their own calls
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
    try:
        main()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        message = f"error: {error}"
        if isinstance(error, RuntimeError):
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            message += ". If the system ran out of memory, lower --num_workers; in containers also raise --shm-size"
        if os.environ.get("ALICE_TRACEBACK"):
            raise
        is_told_by_another = isinstance(error, FlagError) and os.environ.get("LOCAL_RANK", "0") != "0"
        raise SystemExit(1 if is_told_by_another else message) from error
