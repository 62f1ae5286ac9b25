"""The faults of runs: each function lets a run meet one, checks what it does, and repairs the damage as a user would.

After it the same command must lead to where a run that nothing disturbed ends.
"""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import blosc2
import nibabel as nib
import numpy as np

from benchmarks.fault_kinds import in_ranks
from benchmarks.fault_kinds.processes import start, start_ranks, wait_for
from benchmarks.fault_kinds.toy import METHOD_FLAGS, NUM_STEPS, SPACING_MM, STEPS_PER_EPOCH, toy_flags
from benchmarks.fault_kinds.trial import LIMIT_S, Plan, Trial, differences
from datasets.ct.nifti import write_image
from datasets.lists.data_list import load_data_list
from datasets.store.format import ARRAY, case_file
from engine.checkpoint import LATEST, PREVIOUS
from engine.signals import EXIT_INTERRUPTED

KILLED = -signal.SIGKILL
LATE_S, DIES_AFTER_S = 3.0, 1.5  # the late rank leaves the other one time to get into the all-reduce
SHORT_TIMEOUT_MIN, TOO_LATE_S = 0.1, 15.0


def kill_all(trial: Trial) -> str:
    """kill -9 to both ranks, as when the node goes down."""
    ranks = meet_step(trial)
    for rank in ranks:
        rank.kill()
    trial.end(ranks)
    return f"killed, {trial.saved_step()} steps saved"


def ask_to_stop(trial: Trial, number: int) -> str:
    """A stop signal to one rank or to both."""
    ranks = meet_step(trial)
    for rank in trial.plan.choose((ranks[:1], ranks[1:], ranks)):
        if rank.is_alive():
            os.kill(rank.pid, number)
    trial.end(ranks, (EXIT_INTERRUPTED,) * 2, (0, 0))
    trial.expect(trial.saved_step() >= trial.plan.step, f"only {trial.saved_step()} steps were saved")
    return f"stopped by itself, {trial.saved_step()} steps saved"


def fill_disk(trial: Trial) -> str:
    """From some moment on no file of rank 0 may become longer than a part of a checkpoint."""
    ranks = trial.start()
    trial.wait_for_step(ranks, trial.plan.step)
    limit = int(trial.plan.chance * 3_000_000)
    try:
        resource.prlimit(ranks[0].pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    except ProcessLookupError:
        trial.end(ranks, (0, 0))
        return "it was over before"
    codes = trial.end(ranks)
    if codes == [0, 0]:
        return "the last save was over before"
    trial.expect(codes[0] == 1 and codes[1] != 0, f"a run whose last save failed ended with {codes}")
    trial.expect(trial.said("could not write a checkpoint", "File too large"), "it does not say that the disk is full")
    return f"no file above {limit:,} bytes: ended with an error, {trial.saved_step()} steps saved"


def flip_bit(trial: Trial) -> str:
    """A bit of a stored volume changes while the run reads it; the store is mended and an older checkpoint taken."""
    store_dir = trial.folder / "store"
    shutil.copytree(trial.corpus / "store", store_dir)
    trial.changed["store_dir"] = store_dir
    ranks = trial.start()
    trial.wait_for_step(ranks, trial.plan.step)
    good = newest_kept(trial.run_dir)
    name = trial.plan.choose(tuple(case.name for case in load_data_list(trial.corpus / "list.json", trial.corpus)))
    flip_in_chunk(case_file(store_dir, name, ARRAY), trial.plan)
    trial.end(ranks, (0, 0))
    is_named = trial.said(f"case {name} cannot be read", "a checksum differs", str(case_file(store_dir, name, ARRAY)))
    if not is_named:  # then nothing may have been read of it
        trial.expect(not differences(trial.run_dir, trial.folder.parent / trial.plan.method), "the damage went unseen")
    mended = start(
        "scripts.prepare_volumes",
        ["--data_dir", str(trial.corpus), "--json_list", str(trial.corpus / "list.json"), "--store_dir", str(store_dir)]
        + ["--spacing_mm", str(SPACING_MM), "--verify", "--num_workers", "1"],
        trial.output,
    )
    trial.expect(wait_for([mended], LIMIT_S) == [0], "prepare_volumes --verify failed")
    trial.expect(trial.said("1 cases stored"), "prepare_volumes --verify did not store the case again")
    lines = (trial.run_dir / "log.txt").read_text()
    shutil.rmtree(trial.run_dir)
    trial.run_dir.mkdir()
    (trial.run_dir / "log.txt").write_text(lines)
    if good is not None:
        (trial.run_dir / LATEST).write_bytes(good)
    return f"{name}: {'named, other samples took its place' if is_named else 'not read any more'}; stored again"


def truncate_checkpoint(trial: Trial) -> str:
    """The latest checkpoint loses its end while nothing runs."""
    ask_to_stop(trial, signal.SIGTERM)
    latest, has_previous = trial.run_dir / LATEST, (trial.run_dir / PREVIOUS).exists()
    num_bytes = int(trial.plan.chance * latest.stat().st_size)
    os.truncate(latest, num_bytes)
    if has_previous:
        return f"cut to {num_bytes:,} bytes; the one before it was taken"
    trial.end(trial.start(), (1, 1), what="a run without a readable checkpoint")
    trial.expect(trial.said(str(latest), "Start over with --resume none"), "the message names neither file nor flag")
    trial.end(trial.start(resume="none"), (0, 0))
    return f"cut to {num_bytes:,} bytes, the only one: refused, begun anew"


def nan_in_volume(trial: Trial) -> str:
    """A CT file holds NaN when the store is made; later the file is mended."""
    corpus = trial.folder / "corpus"
    shutil.copytree(trial.corpus, corpus, ignore=shutil.ignore_patterns("store", "run"))
    case = trial.plan.choose(tuple(load_data_list(corpus / "list.json", corpus)))
    content = case.image.read_bytes()
    image = nib.load(case.image)
    voxels = np.asarray(image.dataobj, np.float32).copy()
    middle = tuple(slice(size // 2, size // 2 + 2) for size in voxels.shape)
    voxels[middle] = np.nan
    write_image(case.image, nib.Nifti1Image(voxels, image.affine))
    trial.corpus = corpus
    trial.changed |= {"store_dir": trial.folder / "store", "spacing_mm": SPACING_MM}
    ranks = meet_step(trial)
    os.kill(ranks[trial.plan.rank].pid, signal.SIGTERM)
    trial.end(ranks, (EXIT_INTERRUPTED,) * 2, (0, 0))
    trial.expect(trial.said(f"left out: {case.name}: {case.image}: 8 of", "not finite"), "NaN was not named")
    case.image.write_bytes(content)
    trial.end(trial.start(), (0, 0), what="the run that goes on with another case")
    trial.expect(trial.said("other cases", "does not end where it would have ended"), "no word of the added case")
    trial.end(trial.start(resume="none"), (0, 0))
    return f"{case.name} was left out by name; mended and begun anew"


def nan_in_sample(trial: Trial) -> str:
    """A batch holds NaN: all ranks must stop before it changes a weight."""
    flags = toy_flags(trial.plan.method, trial.corpus, trial.run_dir)
    batch = int(flags[flags.index("--batch_size") + 1])
    index = (trial.plan.step * 2 + trial.plan.rank) * batch
    prepare = partial(in_ranks.poison_samples, (index,))
    trial.end(trial.start((prepare, prepare)), (1, 1))
    # A synchronised batch norm takes one rank's NaN to all ranks, and then all are named.
    expected = (f"step {trial.plan.step}: loss or gradient is not finite (", f"rank {trial.plan.rank}: loss [nan]")
    trial.expect(all(map(trial.said, expected)), "it names neither step nor rank")
    return f"stopped by name of its cases, {trial.saved_step()} steps saved"


def die_in_forward(trial: Trial) -> str:
    """A rank dies in the forward pass."""
    return lose_rank(trial, partial(in_ranks.die_in_forward, trial.plan.method, trial.plan.step))


def die_in_all_reduce(trial: Trial) -> str:
    """A rank dies while its gradients wait for the other's."""
    method, step = trial.plan.method, trial.plan.step
    late = partial(in_ranks.come_late, method, step, LATE_S)
    return lose_rank(trial, partial(in_ranks.die_in_all_reduce, method, step, DIES_AFTER_S), late)


def die_in_validation(trial: Trial) -> str:
    """A rank dies while held-out samples are judged."""
    number = trial.plan.step * NUM_STEPS // STEPS_PER_EPOCH // NUM_STEPS
    return lose_rank(trial, partial(in_ranks.die_in_validation, trial.plan.method, number))


def die_in_saving(trial: Trial) -> str:
    """Rank 0 dies at some moment of a save."""
    number = max(1, trial.plan.step // STEPS_PER_EPOCH)  # the first save, 0, renames no older file
    moment = trial.plan.choose(in_ranks.SAVING_MOMENTS)
    ranks = trial.start((partial(in_ranks.die_in_saving, number, moment), None))
    codes = trial.end(ranks)
    trial.expect(codes[0] == KILLED, f"rank 0 ended with {codes[0]}")
    return f"{moment}: ended with {codes}"


def be_slow(trial: Trial) -> str:
    """A rank comes late: by less than --dist_timeout_min, or by more."""
    is_too_late = trial.plan.chance > 0.5
    late = partial(in_ranks.come_late, trial.plan.method, trial.plan.step, TOO_LATE_S if is_too_late else LATE_S)
    if not is_too_late:
        trial.end(trial.start(trial.on_one_rank(late)), (0, 0))
        return f"{LATE_S:g} s late: waited for"
    codes = trial.end(trial.start(trial.on_one_rank(late), dist_timeout_min=SHORT_TIMEOUT_MIN))
    trial.expect(0 not in codes, f"after the timeout the ranks ended with {codes}")
    trial.expect(trial.said("raise --dist_timeout_min"), "the message does not name --dist_timeout_min")
    return f"{TOO_LATE_S:g} s late, {60 * SHORT_TIMEOUT_MIN:g} s allowed: ended with {codes}"


def set_clocks(trial: Trial) -> str:
    """Clocks of the ranks are wrong by hours, differently at the next start, and so are the files' times."""
    hours = trial.plan.choose((-30_000.0, -5.0, -0.5, 0.5, 5.0, 30_000.0))
    wrong = partial(in_ranks.set_clock, hours)
    ranks = meet_step(trial, trial.on_one_rank(wrong))
    os.kill(ranks[trial.plan.rank].pid, signal.SIGTERM)
    trial.end(ranks, (EXIT_INTERRUPTED,) * 2, (0, 0))
    for path in trial.run_dir.rglob("*"):
        os.utime(path, (time.time() + 3600 * hours,) * 2)
    trial.end(trial.start(trial.on_one_rank(partial(in_ranks.set_clock, -hours))), (0, 0))
    return f"{hours:+g} h, then {-hours:+g} h"


KINDS: dict[str, Callable[[Trial], str]] = {
    "kill -9": kill_all,
    "SIGTERM": partial(ask_to_stop, number=signal.SIGTERM),
    "SIGUSR1": partial(ask_to_stop, number=signal.SIGUSR1),
    "full disk": fill_disk,
    "bit flip in a chunk": flip_bit,
    "truncated checkpoint": truncate_checkpoint,
    "NaN in a CT file": nan_in_volume,
    "NaN in a sample": nan_in_sample,
    "dead rank in forward": die_in_forward,
    "dead rank in all-reduce": die_in_all_reduce,
    "dead rank in saving": die_in_saving,
    "dead rank in validation": die_in_validation,
    "slow rank": be_slow,
    "wrong clock": set_clocks,
}


def draw_plans(num_runs: int, seed: int) -> list[Plan]:
    """Runs with every kind equally often (but for the rest), in random order, each at a random step."""
    rng = random.Random(seed)
    kinds = [list(KINDS)[number % len(KINDS)] for number in range(num_runs)]
    rng.shuffle(kinds)
    methods = list(METHOD_FLAGS)
    return [
        Plan(number, kind, rng.choice(methods), rng.randrange(1, NUM_STEPS - 1), rng.randrange(2), rng.random())
        for number, kind in enumerate(kinds)
    ]


def make_reference(method: str, corpus: Path, folder: Path) -> Path:
    """The run that nothing disturbs; kept where it is complete."""
    run_dir = folder / method
    if not (folder / f"{method}.done").exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        codes = wait_for(start_ranks(toy_flags(method, corpus, run_dir), folder / f"{method}.txt"), LIMIT_S)
        if codes != [0, 0]:
            raise RuntimeError(f"the undisturbed run of {method} ended with {codes}; see {folder / f'{method}.txt'}")
        (folder / f"{method}.done").touch()
    return run_dir


def run_plan(plan: Plan, corpus: Path, folder: Path) -> dict:
    """Let one run meet its fault, resume it, and compare; the record of what happened."""
    reference, began = make_reference(plan.method, corpus, folder), time.monotonic()
    trial = Trial(plan, corpus, folder / f"run{plan.number:03d}")
    shutil.rmtree(trial.folder, ignore_errors=True)
    trial.folder.mkdir(parents=True)
    what = KINDS[plan.kind](trial)
    trial.end(trial.start(), (0, 0), what="the resumed run")
    trial.expect(not trial.said("Traceback (most recent call last)"), "a rank ended with a traceback")
    found = differences(trial.run_dir, reference) if (trial.run_dir / LATEST).exists() else ["no checkpoint"]
    record = {
        "kind": plan.kind,
        "method": plan.method,
        "step": plan.step,
        "rank": plan.rank,
        "what": what,
        "seconds": round(time.monotonic() - began, 1),
        "is_equal": not found,
        "differences": found,
        "problems": trial.problems,
    }
    if record["is_equal"] and not trial.problems:
        shutil.rmtree(trial.folder)
    return record


# Steps of several kinds


def meet_step(trial: Trial, prepare: tuple = (None, None)) -> list:
    """Start the run and come back somewhere in the step after the plan's."""
    ranks = trial.start(prepare)
    trial.wait_for_step(ranks, trial.plan.step)
    time.sleep(0.2 * trial.plan.chance)
    return ranks


def lose_rank(trial: Trial, dying: Callable[[], None], other: Callable[[], None] | None = None) -> str:
    """A rank dies; the other one must end too, and not as if all were well."""
    began = time.monotonic()
    codes = trial.end(trial.start(trial.on_one_rank(dying, other)))
    trial.expect(codes[trial.plan.rank] == KILLED, f"rank {trial.plan.rank} should have died, ended with {codes}")
    trial.expect(codes[1 - trial.plan.rank] not in (0, EXIT_INTERRUPTED), f"the other rank ended with {codes}")
    trial.expect(trial.said("waited for another rank in vain"), "the other rank does not say why it ended")
    return f"the other rank ended with {codes[1 - trial.plan.rank]} after {time.monotonic() - began:.0f} s"


def newest_kept(run_dir: Path) -> bytes | None:
    """The newest numbered checkpoint (--keep_freq), if there is one."""
    kept = sorted(run_dir.glob("checkpoint[0-9]*.pth"))
    return kept[-1].read_bytes() if kept else None


def flip_in_chunk(path: Path, plan: Plan) -> None:
    """Flip one bit of the first chunk's compressed bytes."""
    array = blosc2.open(str(path), mode="r")  # kept: its schunk does not outlive it
    chunk = array.schunk.get_chunk(0)
    content = path.read_bytes()
    position = content.index(chunk) + 32 + int(plan.chance * (len(chunk) - 32))  # behind the chunk's own header
    with path.open("r+b") as file:
        file.seek(position)
        file.write(bytes([content[position] ^ (1 << plan.number % 8)]))
