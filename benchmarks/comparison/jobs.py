"""Jobs: calls of the project's entry points, done once, several side by side in worker processes.

A job is what a user would type, one or more command lines of entry points. It is run by `main(argv)` of that entry
point in a worker process that lives for many jobs, so that imports are paid once. A record of what has been done, with
the words of the command, lets a later run skip it; where the words have changed, the job's own folder is emptied first.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from benchmarks.results import words
from datasets.store.files import write_text

NUM_LOG_LINES = 15
INDECISIVE = ("--num_workers", "--device")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class JobError(ValueError):
    """A job failed; the message names its log file and shows the end of it."""


@dataclass(frozen=True)
class Call:
    """An entry point's module and the words behind it on the command line."""

    module: str
    words: tuple[str, ...]

    @classmethod
    def of(cls, module: str, *more: str, **flags: object) -> "Call":
        """With `flags` as words, and `more` words behind them."""
        return cls(module, (*words(**flags), *more))

    @property
    def command(self) -> str:
        """What one would type."""
        return f"python -m {self.module} " + " ".join(self.words)


@dataclass(frozen=True)
class Job:
    """Calls that are done together.

    Attributes:
        name: of the record and the log, `stage/what`.
        folder: what the job alone writes to; emptied when the calls have changed. None = the calls look after that.
        after: jobs whose results are read; when they change, this one is done again.
        environment: variables set while it runs.
        scraps: file patterns in `folder` that are removed at the end.
    """

    name: str
    calls: tuple[Call, ...]
    folder: Path | None = None
    after: tuple["Job", ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    scraps: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Changes with everything that decides the result, recipes included, not with how many processes make it."""
        decisive = [[call.module, *without_flags(call.words, INDECISIVE)] for call in self.calls]
        recipes = [Path(word) for call in self.calls for word in call.words if word.endswith(".yaml")]
        contents = [path.read_text() for path in recipes if path.is_file()]
        content = json.dumps([decisive, contents, [job.key for job in self.after]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def stage(self) -> str:
        return self.name.split("/")[0]


@dataclass(frozen=True)
class Records:
    """What has been begun and done, one JSON file and one log a job, in a folder."""

    folder: Path

    def path(self, job: Job) -> Path:
        return self.folder / f"{job.name}.json"

    def log(self, job: Job) -> Path:
        return self.folder / f"{job.name}.log"

    def read(self, job: Job) -> dict:
        path = self.path(job)
        return json.loads(path.read_text()) if path.is_file() else {}

    def is_done(self, job: Job) -> bool:
        record = self.read(job)
        return record.get("key") == job.key and "seconds" in record

    def write(self, job: Job, **more: float) -> None:
        record = {"key": job.key, "commands": [call.command for call in job.calls], **more}
        write_text(self.path(job), json.dumps(record, indent=1) + "\n")

    def finished(self) -> dict[str, dict]:
        """Job name -> record of every finished job in the folder."""
        paths = {f"{path.parent.name}/{path.stem}": path for path in sorted(self.folder.glob("*/*.json"))}
        records = {name: json.loads(path.read_text()) for name, path in paths.items()}
        return {name: record for name, record in records.items() if "seconds" in record}


def make_pool(num_parallel: int) -> contextlib.AbstractContextManager[ProcessPoolExecutor | None]:
    """The processes that do jobs; 0 = none, jobs are done in this process."""
    if not num_parallel:
        return contextlib.nullcontext()
    given = (os.getpid(), multiprocessing.get_start_method())
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_parallel, spawn, initializer=set_up_worker, initargs=given)


def run_jobs(jobs: Sequence[Job], records: Records, num_threads: int, pool: ProcessPoolExecutor | None) -> None:
    """Do what is not done yet, begun in the order given, each with so many CPU threads.

    Raises:
        JobError: a job failed; those running then have ended, the others have not been begun.
    """
    missing = [job for job in jobs if not records.is_done(job)]
    if pool is None:
        ended = (do_job(job, records, num_threads) for job in missing)
    else:
        with mock.patch.dict(os.environ, dict.fromkeys(THREAD_VARIABLES, "1")):
            futures = [pool.submit(do_job, job, records, num_threads) for job in missing]
        ended = (future.result() for future in as_completed(futures))
    try:
        for number, (name, seconds) in enumerate(ended, 1):
            print(f"{name}: {seconds:.0f} s, {len(missing) - number} to go", flush=True)
    except BaseException:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        raise


def set_up_worker(parent: int, start_method: str) -> None:
    """Let this process end when the one that started it is gone, and start processes of its own as a user's would.

    A spawned process spawns too: every loading process would import everything again, where a user's are forked.
    """
    multiprocessing.set_start_method(start_method, force=True)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def do_job(job: Job, records: Records, num_threads: int) -> tuple[str, float]:
    """Run a job's calls one after the other in this process; what they print goes to the job's log.

    Returns:
        Its name and seconds.

    Raises:
        JobError: one of them failed, or the job's folder holds something that no job has made.
    """
    before = records.read(job)
    if before.get("key") != job.key and job.folder is not None and job.folder.exists():
        if not before and any(job.folder.iterdir()):
            raise JobError(
                f"{job.name}: {job.folder} is not empty, and {records.path(job)} does not say that this comparison "
                "made it; choose another --output_dir, or move that folder away"
            )
        shutil.rmtree(job.folder)
    started = time.time()
    records.write(job, started=started)
    log = records.log(job)
    try:
        with mock.patch.dict(os.environ, job.environment), output_to(log):
            torch.set_num_threads(num_threads)
            for call in job.calls:
                run_call(call)
    except (Exception, SystemExit) as error:
        lines = log.read_text().splitlines()[-NUM_LOG_LINES:]
        raise JobError(f"{job.name} failed ({error!r}); {log} ends with\n" + "\n".join(lines)) from None
    for pattern in job.scraps:
        for path in sorted(job.folder.glob(pattern)):
            path.unlink()
    seconds = time.time() - started
    records.write(job, started=started, seconds=seconds)
    return job.name, seconds


def run_call(call: Call) -> None:
    """`main(argv)` of an entry point, as from the command line: its run record shows the words."""
    print(f"$ {call.command}", flush=True)
    try:
        with mock.patch.object(sys, "argv", [call.module, *call.words]):
            importlib.import_module(call.module).main(list(call.words))
    finally:  # the next call, or another process, has the memory
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send everything that this process and its children print to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    with path.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for number in kept:
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            file.flush()
            for number, copy in kept.items():
                os.dup2(copy, number)
                os.close(copy)


def without_flags(given: Sequence[str], names: Sequence[str]) -> list[str]:
    """Words of a command line without some flags and the one value of each."""
    dropped = {place + offset for place, word in enumerate(given) if word in names for offset in (0, 1)}
    return [word for place, word in enumerate(given) if place not in dropped]
