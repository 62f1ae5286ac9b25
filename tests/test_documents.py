"""The documents: commands parse, links and flags exist, every recipe and command is described, pages stay short."""

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
READMES = ("README.md", "configs/README.md", "scripts/README.md")
DOCUMENTS = (*READMES, "benchmarks/RESULTS.md", "benchmarks/LOG.md")
MOST_LINES = {"README.md": 250, "benchmarks/RESULTS.md": 250}
LAUNCHERS = {"scripts/slurm_pretrain.sh": "main_ddp"}  # scripts that hand their arguments on
# of torchrun, sbatch, docker, nnU-Net and Chromium
FOREIGN_FLAGS = {
    "nproc_per_node",
    "nnodes",
    "max-restarts",
    "rdzv_backend",
    "rdzv_endpoint",
    "nodes",
    "shm-size",
    "no_pp",
    "headless",
    "screenshot",
    "window-size",
    "virtual-time-budget",
}


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text()


def command_lines(document: str) -> list[str]:
    """The lines of a document's bash blocks, continuation lines joined, comments left out."""
    blocks = re.findall(r"```bash\n(.*?)```", text_of(document), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def started(line: str) -> tuple[str, list[str]] | None:
    """The module that a command line starts, and the arguments that it receives; None where it is not one of ours."""
    words = [word.strip('"') for word in line.split()]
    for position, word in enumerate(words):
        if word.endswith(".py") or word in LAUNCHERS:
            return LAUNCHERS.get(word, word.removesuffix(".py").replace("/", ".")), words[position + 1 :]
        if word == "-m" and words[position + 1].startswith("benchmarks."):
            return words[position + 1], words[position + 2 :]
    return None


def parser_for(module_name: str, words: list[str]):
    """The parser that reads these words; that of main_ddp.py depends on the method they name."""
    module = importlib.import_module(module_name)
    if hasattr(module, "chosen_method"):
        return module.make_flags(module.chosen_method(words))
    return module.make_flags()


COMMANDS = [(document, line) for document in DOCUMENTS for line in command_lines(document)]
STARTED = [(document, *started(line)) for document, line in COMMANDS if started(line)]


@pytest.mark.parametrize("document, module, words", STARTED, ids=[f"{name}-{module}" for name, module, _ in STARTED])
def test_commands_parse(document, module, words, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    parser_for(module, words).parse_args(words)


@pytest.mark.parametrize("document, line", [pair for pair in COMMANDS if not started(pair[1])])
def test_other_commands_start_something_that_exists(document, line):
    """Shell scripts and pytest: no entry point parses them."""
    words = line.split()
    assert words[0] in ("bash", "python"), f"{document}: unknown command {line!r}"
    target = words[1] if words[0] == "bash" else words[-1]
    assert (REPOSITORY / target).exists(), f"{document}: {target} does not exist"


def anchors_of(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    here = REPOSITORY / document
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", here.read_text()):
        path, _, anchor = target.partition("#")
        there = (here.parent / path).resolve() if path else here
        assert there.exists(), f"{document} links to {path}, which does not exist"
        assert not anchor or anchor in anchors_of(there), f"{document} links to {target}: no such part"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_recipes_and_source_files_exist(document):
    names = set(re.findall(r"\b[a-z0-9_/]+\.(?:py|yaml|sh)\b", text_of(document)))
    folders = ("", "configs", "scripts", "benchmarks")
    lost = {name for name in names if not any((REPOSITORY / folder / name).exists() for folder in folders)}
    assert not lost, f"{document} names files that do not exist: {sorted(lost)}"


@cache
def known_flags() -> set[str]:
    """Flags of all entry points and benchmarks."""
    paths = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("scripts/*.py"), *REPOSITORY.glob("benchmarks/*.py")]
    modules = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts) for path in paths]
    given = [(module, []) for module, path in zip(modules, paths) if "def make_flags(" in path.read_text()]
    given += [("main_ddp", ["--method", name]) for name in getattr(importlib.import_module("main_ddp"), "METHODS", ())]
    parsers = [parser_for(module, words) for module, words in given]
    options = [option for parser in parsers for action in parser._actions for option in action.option_strings]
    return {option.removeprefix("--") for option in options}


@pytest.mark.parametrize("document", READMES)
def test_flags_exist(document):
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text_of(document)))
    unknown = named - known_flags() - FOREIGN_FLAGS
    assert not unknown, f"{document} names flags that no command has: {sorted(unknown)}"


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_described_and_shows_a_command_that_parses(path, monkeypatch):
    assert f"`{path.name}`" in text_of("configs/README.md")
    head = re.match(r"(?:#.*\n)+", path.read_text()).group()
    commands = re.sub(r"\\\n#\s*", " ", head).splitlines()
    module, words = next(filter(None, (started(line) for line in commands if line.startswith("#   "))))
    monkeypatch.chdir(REPOSITORY)
    parser_for(module, words).parse_args(words)


SCRIPTS = [path for path in REPOSITORY.glob("scripts/*") if path.suffix in (".py", ".sh") and path.stem != "__init__"]


@pytest.mark.parametrize("path", sorted(SCRIPTS), ids=lambda path: path.name)
def test_every_script_is_described(path):
    """A line of the table says what it writes, and a block starts it; what only other scripts read is named."""
    text = text_of("scripts/README.md")
    if path.name in ("environment.sh", "stage.sh"):
        assert f"`{path.name}`" in text
    else:
        assert re.search(rf"^\| \[[^\]]*\b{path.name}\b", text, re.MULTILINE)
        assert any(f"scripts/{path.name}" in line.split() for line in command_lines("scripts/README.md"))


@pytest.mark.parametrize("document, most", MOST_LINES.items())
def test_pages_stay_short(document, most):
    assert text_of(document).count("\n") < most


@pytest.mark.parametrize("document", READMES)
def test_no_sentence_stands_twice(document):
    """Prose of one README is not repeated in another."""

    def sentences(name: str) -> set[str]:
        prose = re.sub(r"```.*?```", "", text_of(name), flags=re.DOTALL)
        lines = [line for line in prose.splitlines() if not line.startswith(("|", "#", "!"))]
        joined = re.sub(r"\s+", " ", " ".join(lines))
        return {sentence for sentence in re.split(r"(?<=[.:]) ", joined) if len(sentence.split()) > 5}

    others = set().union(*(sentences(other) for other in DOCUMENTS if other != document))
    assert not sentences(document) & others


def test_pictures_of_the_readme_are_all_there_are():
    shown = set(re.findall(r"!\[[^\]]+\]\(assets/([^)]+)\)", text_of("README.md")))
    assert shown == {path.name for path in (REPOSITORY / "assets").iterdir()}
