"""How an entry point ends after a mistake: in one line that says what to change, on one process of a machine."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

import main_ddp
import scripts.finetune_segmentation as finetuning
from datasets.samples.loader import make_pair_loader
from engine import distributed
from engine.device import explained_out_of_memory
from engine.distributed import LostRankError, World
from engine.flags import FlagError, run_main
from tests.labelled_corpus import finetune_arguments, make_labelled_corpus
from tests.launched import smallest
from tests.tiny_run import add_store_and_table, make_corpus

OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 5.25 MiB is free"
    ". Including non-PyTorch memory, this process has 79.10 GiB memory in use. See documentation for Memory Management"
)


def run_out_of_memory(*_, **__):
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def test_a_full_gpu_names_what_the_run_asked_for():
    flags = SimpleNamespace(batch_size=8, roi_z=96)
    with pytest.raises(ValueError) as error, explained_out_of_memory(flags, "batch_size roi_z", "lower it"):
        run_out_of_memory()
    assert str(error.value) == (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 5.25 MiB is "
        "free. This run has --batch_size 8, --roi_z 96: lower it"
    )
    with pytest.raises(RuntimeError, match="another"), explained_out_of_memory(flags, "batch_size", "lower it"):
        raise RuntimeError("another")


def test_pretraining_and_finetuning_say_which_flags_cure_it(tmp_path, monkeypatch):
    corpus = add_store_and_table(make_corpus(tmp_path))
    monkeypatch.setattr(main_ddp, "pretrain", run_out_of_memory)
    with pytest.raises(ValueError, match=r"out of memory.*--batch_size 2, .*halve --batch_size .*--use_checkpoint"):
        main_ddp.main(smallest(corpus, tmp_path / "run"))
    labelled = make_labelled_corpus(tmp_path / "labelled")
    monkeypatch.setattr(finetuning, "finetune", run_out_of_memory)
    with pytest.raises(ValueError, match=r"out of memory.*--batch_size 1, .*lower --batch_size .*--use_checkpoint"):
        finetuning.main(finetune_arguments(labelled, tmp_path / "finetuned"))


def test_a_list_without_cases_is_named(tmp_path):
    corpus = add_store_and_table(make_corpus(tmp_path))
    (tmp_path / "empty.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match=r"--json_list .*empty.json: no cases in 'training'"):
        main_ddp.main([*smallest(corpus, tmp_path / "run"), "--json_list", str(tmp_path / "empty.json")])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[x/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:26541"),
        RuntimeError("Timed out waiting 6000ms for recv operation to complete"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
    ],
)
def test_a_rank_that_waited_in_vain_says_which_flag_and_what_to_do(monkeypatch, error):
    monkeypatch.setattr(distributed, "has_group", lambda: True)
    with (
        pytest.raises(LostRankError, match=r"rank 1 waited for another rank in vain \(.*--dist_timeout_min 0\.5"),
        distributed.explained_lost_rank(World(1, 1, 2), 0.5),
    ):
        raise error


def test_other_errors_stay_what_they_are(monkeypatch):
    with pytest.raises(RuntimeError, match="Broken pipe"), distributed.explained_lost_rank(World(), 0.5):
        raise RuntimeError("Broken pipe")  # there is no other rank
    monkeypatch.setattr(distributed, "has_group", lambda: True)
    with pytest.raises(RuntimeError, match="shape"), distributed.explained_lost_rank(World(1, 1, 2), 0.5):
        raise RuntimeError("shape mismatch")


class Dying(Dataset):
    """A sample that the system ends its process for."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1)


def test_a_killed_loading_process_is_told_in_a_line():
    loader = make_pair_loader(Dying(), batch_size=1, num_workers=1)
    with pytest.raises(SystemExit, match=r"error: DataLoader worker \(pid.*lower --num_workers"):
        run_main(lambda: next(iter(loader)))


def fail_with(error: Exception):
    raise error


def test_what_is_no_mistake_of_a_user_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="in a kernel"):
        run_main(lambda: fail_with(RuntimeError("in a kernel")))


@pytest.mark.parametrize(
    ("local_rank", "error", "expected"),
    [
        ("0", FlagError(["--lr 0"]), "error: --lr 0"),
        ("1", FlagError(["--lr 0"]), 1),  # the first process of the machine has found it too
        ("1", ValueError("rank 1 alone"), "error: rank 1 alone"),
    ],
)
def test_mistakes_in_flags_are_told_once_a_machine(monkeypatch, local_rank, error, expected):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: fail_with(error))
    assert ended.value.code == expected
