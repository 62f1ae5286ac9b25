"""Real launchers around main_ddp.py: torchrun with a rank that dies, and the Slurm script with stand-ins for Slurm."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoint import LATEST, load_checkpoint
from engine.flags import REPOSITORY
from engine.signals import EXIT_INTERRUPTED
from tests.launched import free_port, smallest, wait_until
from tests.tiny_run import add_store_and_table, log_of, make_corpus

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks into /proc")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus")))


def plain_environment(**added: str) -> dict[str, str]:
    """This environment without what a launcher around the tests may have set, one thread a process."""
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in foreign and not name.startswith(("SLURM_", "TORCHELASTIC_"))
    }
    return own | {"OMP_NUM_THREADS": "1"} | added


def ranks_of(output_dir: Path) -> dict[int, int]:
    """Rank -> process id of the processes that train into a folder, as their environment has it."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if f"--output_dir={output_dir}".encode() not in words or b"main_ddp.py" not in words[1:3]:
                continue
            variables = dict(word.split(b"=", 1) for word in (folder / "environ").read_bytes().split(b"\0") if word)
        except (OSError, ValueError):  # it has just ended
            continue
        if b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(folder.name)
    return found


def last_step(output_dir: Path) -> int:
    return max((line["step"] for line in log_of(output_dir)), default=0)


def test_a_dead_rank_ends_the_others_within_a_minute_and_torchrun_resumes(corpus, tmp_path):
    run, told = tmp_path / "run", tmp_path / "told.txt"
    argv = smallest(corpus, run, batch_size=1, epochs=100_000, warmup_epochs=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3"]
    with told.open("w") as output:
        torchrun = subprocess.Popen(
            [*launcher, f"--master-port={free_port()}", "main_ddp.py", *argv],
            cwd=REPOSITORY, env=plain_environment(), stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(lambda: torchrun.poll() is not None or last_step(run) >= 3)
        first = ranks_of(run)
        assert first.keys() == {0, 1}
        os.kill(first[1], signal.SIGKILL)
        wait_until(lambda: first[0] not in ranks_of(run).values(), timeout_s=60)
        wait_until(lambda: torchrun.poll() is not None or "resumed at step" in told.read_text())
        step = int(told.read_text().split("resumed at step ")[1].split()[0])
        assert step >= 2 and step % 2 == 0  # a save every two steps
        wait_until(lambda: torchrun.poll() is not None or last_step(run) > step + 2)
        second = ranks_of(run)
        assert second.keys() == {0, 1} and not set(second.values()) & set(first.values())
    finally:
        torchrun.terminate()
        torchrun.wait(120)
    assert ranks_of(run) == {}
    steps = [line["step"] for line in log_of(run)]
    assert steps == list(range(1, len(steps) + 1))  # each once, across the restart


def test_ranks_whose_torchrun_is_gone_save_and_end(corpus, tmp_path):
    """torchrun dies of SIGUSR1 without a word to its processes."""
    run, told = tmp_path / "run", tmp_path / "told.txt"
    argv = smallest(corpus, run, batch_size=1, epochs=1, steps_per_epoch=100_000, warmup_epochs=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}"]
    with told.open("w") as output:
        torchrun = subprocess.Popen(
            [*launcher, "main_ddp.py", *argv],
            cwd=REPOSITORY, env=plain_environment(), stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    wait_until(lambda: torchrun.poll() is not None or last_step(run) >= 1)
    torchrun.send_signal(signal.SIGUSR1)
    torchrun.wait(60)
    try:
        wait_until(lambda: not ranks_of(run), timeout_s=60)
    finally:
        for rank in ranks_of(run).values():
            os.kill(rank, signal.SIGKILL)
    assert load_checkpoint(run / LATEST)["step"] >= 1
    assert "asked to stop" in told.read_text() and "Traceback" not in told.read_text(), told.read_text()


# Slurm's part of the bargain: srun starts the tasks and passes SIGUSR1 on, ends the others 20 s after the first has
# ended, and returns the largest exit code; sbatch sets the variables and runs the script; scontrol names hosts and
# notes what is requeued.
SRUN = """#!{python} -S
import os, signal, subprocess, sys, time
assert sys.argv[1] == "--wait=20", sys.argv
tasks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}})
    for rank in range(int(os.environ["SLURM_NTASKS"]))
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
open({folder!r} + "/srun.pid", "w").write(str(os.getpid()))
ended = None
while None in (codes := [task.poll() for task in tasks]):
    ended = ended or (any(code is not None for code in codes) and time.monotonic())
    if ended and time.monotonic() > ended + 20:
        for task in tasks:
            task.kill()
    time.sleep(0.05)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
    "show hostnames") echo 127.0.0.1; echo other-node ;;
    "requeue 4711") echo "$2" >> {folder}/requeued ;;
    *) exit 1 ;;
esac
"""
SBATCH = """#!/bin/sh
export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST='node[1-2]' SLURM_NTASKS=2 SLURM_SUBMIT_DIR={repository}
cp "$1" {folder}/spooled_script
shift
exec bash {folder}/spooled_script "$@"
"""


@pytest.fixture
def slurm(tmp_path):
    """A folder with stand-ins for srun, scontrol and sbatch."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        content = text.format(python=sys.executable, folder=str(folder), repository=REPOSITORY)
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return folder


def submit(slurm: Path, argv: list[str], told: Path, **variables: str) -> subprocess.Popen:
    environment = plain_environment(PATH=f"{slurm}:{os.environ['PATH']}", **({"PYTHON": sys.executable} | variables))
    command = ["sbatch", str(REPOSITORY / "scripts" / "slurm_pretrain.sh"), *argv]
    with told.open("a") as output:
        return subprocess.Popen(
            command, executable=str(slurm / "sbatch"), env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def test_slurm_job_saves_before_its_time_limit_requeues_itself_and_goes_on(corpus, tmp_path, slurm):
    run, told, num_steps = tmp_path / "run", tmp_path / "told.txt", 12
    argv = smallest(corpus, run, batch_size=1, epochs=1, steps_per_epoch=num_steps)
    job = submit(slurm, argv, told)
    wait_until(lambda: job.poll() is not None or last_step(run) >= 1)
    assert not (run / LATEST).exists()  # the only save will be the one that the signal asks for
    os.kill(int((slurm / "srun.pid").read_text()), signal.SIGUSR1)
    assert job.wait(300) == EXIT_INTERRUPTED, told.read_text()
    step = load_checkpoint(run / LATEST)["step"]
    assert 1 <= step < num_steps and ranks_of(run) == {}
    assert (slurm / "requeued").read_text().split() == ["4711"]
    job = submit(slurm, argv, told)
    assert job.wait(300) == 0, told.read_text()
    assert f"resumed at step {step}" in told.read_text() and "2 processes" in told.read_text()
    assert [line["step"] for line in log_of(run)] == list(range(1, num_steps + 1))
    assert load_checkpoint(run / LATEST)["step"] == num_steps
    assert (slurm / "requeued").read_text().split() == ["4711"]


@pytest.mark.parametrize(
    ("devices", "local_ranks", "code"), [("", "01", 75), ("0,1", "01", 1), ("3", "00", 0), ("GPU-5ac", "00", 75)]
)
def test_slurm_tasks_know_who_they_are_and_only_an_interruption_is_requeued(
    tmp_path, slurm, devices, local_ranks, code
):
    """With a program that tells its variables in place of Python. One visible GPU: Slurm has dealt them out."""
    program = slurm / "program"
    line = "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $OMP_NUM_THREADS"
    program.write_text(f'#!/bin/sh\n[ "$RANK" = 1 ] && sleep 0.2\necho "told {line} <$1> <$2> <$3>"\nexit {code}\n')
    program.chmod(0o755)
    variables = {"PYTHON": str(program), "CUDA_VISIBLE_DEVICES": devices}
    job = submit(slurm, ["--config", "a file.yaml"], tmp_path / "told.txt", **variables)
    assert job.wait(60) == code
    told = [line for line in (tmp_path / "told.txt").read_text().splitlines() if line.startswith("told")]
    assert told == [
        f"told {rank} {local_rank} 2 127.0.0.1:24711 1 <main_ddp.py> <--config> <a file.yaml>"
        for rank, local_rank in enumerate(local_ranks)
    ]
    assert (slurm / "requeued").exists() == (code == EXIT_INTERRUPTED)
