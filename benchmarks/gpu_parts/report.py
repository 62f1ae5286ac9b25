"""The figures of `benchmarks.gpu_check` as Markdown for RESULTS.md: one table of steps, one of methods, one of time."""

from collections.abc import Iterator

from benchmarks import data_wait
from benchmarks.gpu_parts.items import DEFAULT, NAIVE
from benchmarks.results import Rows, table

METHOD_HEADER = ("method", "crop, samples a step", "steps", "loss, first -> last", "samples/s", "memory", "data wait")
NUM_COLUMNS = 5  # operators of each method


def markdown(found: dict) -> str:
    """All tables that there are figures for, and what failed.

    Args:
        found: `about` and `items`, as gpu_check.json holds them.
    """
    items = found["items"]
    parts = [headline(found["about"])]
    if lines := [*tests_rows(items), *step_rows(items), *wait_rows(items)]:
        parts.append(table(lines))
    runs = {name.removeprefix("method_"): item["figures"] for name, item in items.items() if is_run(name, item)}
    if runs:
        parts.append(table([method_line(name, figures) for name, figures in runs.items()], METHOD_HEADER))
    profiles = {name: figures["profile"] for name, figures in runs.items() if "profile" in figures}
    if profiles:
        header = ("method", "operators, ms a step", *[""] * NUM_COLUMNS)
        parts.append(table([profile_line(name, figures) for name, figures in profiles.items()], header))
    parts += failures(items)
    return "\n\n".join(parts)


def headline(about: dict) -> str:
    """Date, commit, card, versions and command."""
    cuda = f", CUDA {about['cuda']}" if about["cuda"] else ""
    command = "`bash scripts/gpu_check.sh" + (" --rehearse`: toy sizes, no result" if about["is_rehearsal"] else "`")
    where = f"{about['device']}, PyTorch {about['torch']}{cuda}, Python {about['python']}, {about['num_cpus']} cores"
    return f"{about['date']}, commit {about['commit'][:7]}, {where}: {command}"


def is_run(name: str, item: dict) -> bool:
    """Whether an item is a method's training that has come as far as its figures."""
    return name.startswith("method_") and "loss_last" in item["figures"]


def failures(items: dict) -> list[str]:
    """A list of the items that failed, in one entry; none where all went well."""
    lines = [f"- **{name} failed**: {item['error']}" for name, item in items.items() if item["error"]]
    return ["\n".join(lines)] if lines else []


# Lines under HEADER


def tests_rows(items: dict) -> Rows:
    """How many of the GPU's tests passed."""
    figures = items.get("gpu_tests", {}).get("figures", {})
    if not figures:
        return []
    passed, failed, skipped = (len(figures[name]) for name in ("passed", "failed", "skipped"))
    return [("tests with the marker `gpu`", f"{passed} passed, {failed} failed, {skipped} skipped", "", "", "0 failed")]


def step_rows(items: dict) -> Rows:
    """Each setting beside MONAI's form at the same precision; the default's two lines say what is wanted."""
    settings = {}
    for name in ("step", "compile"):
        settings |= items.get(name, {}).get("figures", {})
    settings = {name: found for name, found in settings.items() if "step_ms" in found}
    naive = settings.get(NAIVE)
    return [row for name in settings if name != NAIVE for row in rows_of_setting(name, settings[name], naive)]


def rows_of_setting(name: str, found: dict, naive: dict | None) -> Iterator[tuple[str, str, str, str, str]]:
    """Time and memory: two lines of the default, one of others."""
    ms, gb = f"{found['step_ms']:.0f} ms", gigabytes(found)
    beside_ms, beside_gb, faster, smaller = f"{NAIVE} did not run", "", "", ""
    if naive:
        beside_ms, beside_gb = f"{naive['step_ms']:.0f} ms, {NAIVE}, eager, {naive['precision']}", gigabytes(naive)
        faster = f"{naive['step_ms'] / found['step_ms']:.2f}x"
    if gb and beside_gb:
        smaller = f"{found['reserved_gb'] / naive['reserved_gb']:.2f}x"
    if name == DEFAULT:
        crop = "x".join(map(str, found["roi"]))
        yield f"Alice's step, {crop}, {found['num_pairs']} pairs, {found['precision']}", ms, beside_ms, faster, ">= 3x"
        yield "its memory", gb, beside_gb, smaller, "<= 0.5x"
    else:
        yield f"step, {name}", ", ".join(filter(None, (ms, gb))), "", ", ".join(filter(None, (faster, smaller))), ""


def gigabytes(found: dict) -> str:
    """The peak of memory, where the system says it."""
    return f"{found['reserved_gb']:.1f} GB" if found.get("reserved_gb") else ""


def wait_rows(items: dict) -> Rows:
    """The line of `benchmarks.data_wait`."""
    figures = items.get("data_wait", {}).get("figures", {})
    return data_wait.rows(figures) if figures else []


# Methods


def method_line(name: str, figures: dict) -> tuple[str, ...]:
    """A line under METHOD_HEADER."""
    return (
        f"`{name}`",
        f"{figures['crop']}, {figures['batch_size']}",
        f"{figures['num_steps']}",
        f"{figures['loss_first']:.4g} -> {figures['loss_last']:.4g}",
        f"{figures['samples_per_s']:.1f}",
        gigabytes(figures),
        f"{100 * figures['data_wait_share']:.1f} %",
    )


def profile_line(name: str, figures: dict) -> tuple[str, ...]:
    """The costliest operators of a method's step and their shares."""
    named = [
        f"{operator['name'].removeprefix('aten::')} {100 * operator['share']:.0f} %"
        for operator in figures["operators"][:NUM_COLUMNS]
    ]
    time = f"{figures['operators_ms']:.1f} of {figures['step_ms']:.1f}"
    return (f"`{name}`", time, *named, *[""] * (NUM_COLUMNS - len(named)))
