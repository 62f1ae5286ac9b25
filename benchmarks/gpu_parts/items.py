"""The machine, the tests that need a GPU, Alice's step beside MONAI's form, and waiting for data."""

import platform
from dataclasses import asdict, replace

import torch

import main_ddp
from benchmarks import data_wait
from benchmarks.gpu_parts.apart import Workplace
from benchmarks.pretrain_step import QUICK, Bench, Setting, flagged, rungs
from engine.flags import REPOSITORY, available_cpus

PAIRS, ROI = 8, (96, 96, 96)
TOY_PAIRS, TOY_ROI = 1, (64, 32, 32)
NUM_STEPS = 6  # timed, of each setting
NAIVE, DEFAULT, FP32 = "MONAI's form", "default", "MONAI's form, fp32"
# One for each way through the code
TOY_SETTINGS = (NAIVE, DEFAULT, "default + --no_channels_last", "default + --use_checkpoint", "default + --compile")
CASES, TOY_CASES, TOY_COARSEN = 8, 2, 2.0
WAIT_STEPS, WAIT_WORKERS = 60, 12


def machine(place: Workplace) -> None:
    """What the figures belong to. It comes first, since the first process waits for all imports."""
    device = place.device
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    place.keep(
        {
            "device": properties.name if properties else "CPU",
            "memory_gb": properties.total_memory / 2**30 if properties else None,
            "cuda": torch.version.cuda if properties else None,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "num_cpus": available_cpus(),
        }
    )


# Tests


class Outcomes:
    """A pytest plugin that counts what became of each test."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        """Called for set-up, call and tear-down of each test."""
        if report.when == "call" or report.outcome != "passed":
            getattr(self, report.outcome).append(report.nodeid)


def gpu_tests(place: Workplace) -> None:
    """The tests with the marker `gpu`; without a GPU they are collected and skipped.

    Raises:
        RuntimeError: one failed, was skipped although there is a GPU, or there are none.
    """
    import pytest  # here, so that a machine without it can measure all the rest

    files = [str(path) for path in sorted((REPOSITORY / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    outcomes = Outcomes()
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", *files], plugins=[outcomes])
    place.keep(vars(outcomes))
    num_wrong = len(outcomes.failed) + (0 if place.is_rehearsal else len(outcomes.skipped))
    if code != 0 or num_wrong:
        raise RuntimeError(f"pytest ended with code {int(code)}, {num_wrong} tests failed or were skipped")


# Alice's step


def step_settings(roi: tuple[int, int, int], num_pairs: int, precision: str) -> list[Setting]:
    """MONAI's form and ours at equal precision, then each flag, then the rungs between the two; first what matters."""
    naive_fp32, *between, default = rungs(roi, num_pairs, precision)
    naive = replace(naive_fp32, name=NAIVE, precision=precision)
    return [naive, replace(default, name=DEFAULT), *flagged(default), replace(naive_fp32, name=FP32), *between]


def step(place: Workplace) -> None:
    """Time and memory of every setting but the compiled one, in one process.

    Raises:
        RuntimeError: a setting did not run; the others have.
    """
    measure_steps(place, [setting for setting in sized_settings(place) if not setting.is_compiled])


def compiled_step(place: Workplace) -> None:
    """The same of the compiled setting. On a CPU, where compiling takes minutes, it is left out."""
    if place.device.type == "cuda":
        measure_steps(place, [setting for setting in sized_settings(place) if setting.is_compiled])


def sized_settings(place: Workplace) -> list[Setting]:
    """The settings at full size, or some at toy size."""
    if not place.is_rehearsal:
        return step_settings(ROI, PAIRS, place.precision)
    settings = step_settings(TOY_ROI, TOY_PAIRS, place.precision)
    return [replace(setting, keep_memory=True) for setting in settings if setting.name in TOY_SETTINGS]


def measure_steps(place: Workplace, settings: list[Setting]) -> None:
    """Keep the figures of each setting under its name, once they are there."""
    bench = Bench(QUICK if place.is_rehearsal else {}, place.device)
    broken = []
    for setting in settings:
        found = bench.measure(setting, 1 if place.is_rehearsal else NUM_STEPS)
        print(setting.name, found, flush=True)
        place.keep({setting.name: asdict(setting) | found})
        broken += [f"{setting.name}: {found['error']}"] if "error" in found else []
    if broken:
        raise RuntimeError("; ".join(broken))


# Data


def corpus(place: Workplace) -> None:
    """Phantoms, their store and a table of matches, for all trainings of this call."""
    size = (TOY_CASES, TOY_COARSEN) if place.is_rehearsal else (CASES,)
    data_wait.make_phantom_corpus(place.folder, *size)


def waiting(place: Workplace) -> None:
    """How long a step of the default recipe waits for data."""
    sizes = {"batch_size": PAIRS, "num_workers": WAIT_WORKERS, "num_steps": WAIT_STEPS}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    flags = data_wait.make_flags().parse_args(["--quick"] if place.is_rehearsal else words)
    data_wait.resolve(flags)
    main_ddp.main(list(data_wait.run_words(place.folder, flags)))
    place.keep(data_wait.figures(place.folder, flags))
