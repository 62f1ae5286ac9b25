"""main_ddp.py on the folder of a run before: other data, other flags, nothing left to do."""

import json
import shutil
import warnings

import pytest
import torch

import main_ddp
from datasets.samples.correspondences import CorrespondenceTable
from engine.checkpoint import LATEST, CheckpointError, load_checkpoint
from tests.launched import smallest
from tests.tiny_run import add_store_and_table, log_of, make_corpus

SHORT = {"epochs": 2, "steps_per_epoch": 1, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return add_store_and_table(make_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def first_step(corpus, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("first_step")
    main_ddp.main(smallest(corpus, output_dir, **SHORT | {"epochs": 1}))
    return output_dir


@pytest.fixture
def run(first_step, tmp_path):
    """A folder whose run has done the first of two steps."""
    return shutil.copytree(first_step, tmp_path / "run")


def go_on(corpus, run, **changed) -> list[str]:
    """The warnings of a run that goes on."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        main_ddp.main(smallest(corpus, run, **SHORT | changed))
    return [str(one.message) for one in heard if "was trained on" in str(one.message)]


def test_the_same_data_at_other_places_go_on_without_a_word_about_them(corpus, run, tmp_path):
    shutil.copytree(corpus, tmp_path / "moved")
    assert go_on(tmp_path / "moved", run) == []
    assert load_checkpoint(run / LATEST)["step"] == 2


def test_another_list_is_warned_of_with_its_flags(corpus, run, tmp_path):
    content = json.loads((corpus / "list.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps(content | {"training": content["training"][:2]}))
    (line,) = go_on(corpus, run, json_list=tmp_path / "list.json")
    assert "trained on other cases (--json_list, --data_dir, --store_dir): 3 cases then, 2 now" in line


def test_another_order_of_the_list_is_other_data(corpus, run, tmp_path):
    content = json.loads((corpus / "list.json").read_text())
    (tmp_path / "list.json").write_text(json.dumps(content | {"training": content["training"][::-1]}))
    (line,) = go_on(corpus, run, json_list=tmp_path / "list.json")
    assert "other cases" in line


def test_another_table_is_warned_of(corpus, run, tmp_path):
    table = CorrespondenceTable.load(corpus / "embeddings")
    CorrespondenceTable.write(tmp_path / "fewer", table.case_names, table.rows[:-1].copy(), table.provenance)
    (line,) = go_on(corpus, run, embed_dir=tmp_path / "fewer")
    assert "another correspondence table (--table_file, --embed_dir)" in line and "other cases" not in line


def test_a_refused_run_leaves_the_record_of_the_one_before(corpus, run):
    before = (run / "run.json").read_bytes()
    with pytest.raises(CheckpointError, match="does not fit"):
        main_ddp.main(smallest(corpus, run, **SHORT | {"feature_size": 12}))
    assert (run / "run.json").read_bytes() == before


def poison(state: dict) -> None:
    next(iter(state["student"].values())).view(-1)[0] = float("nan")


def poison_moments(state: dict) -> None:
    next(iter(state["optimizer"]["state"].values()))["exp_avg"].fill_(float("inf"))


@pytest.mark.parametrize(
    "damage, message",
    [
        (poison, "checkpoint.pth: 1 of .* tensors hold values that are not finite"),
        (poison_moments, "optimiser state does not fit this run .exp_avg holds values that are not finite"),
        (lambda state: state.update(step=[1]), r"its step is \[1\], expected int"),
        (lambda state: state.update(step=-1), "its step is -1, expected 0 or more"),
        (lambda state: state.update(flags=5), "its flags is 5, expected dict"),
        (lambda state: state.update(student=None), "its student is None, expected dict"),
        (lambda state: state.update(kind=["alice"]), "not a checkpoint of kind 'alice'"),
        (lambda state: state.update(optimizer={}), "optimiser state does not fit this run"),
        (lambda state: state.pop("scaler"), "holds no 'scaler'; expected a checkpoint of --method alice"),
    ],
)
def test_a_checkpoint_that_says_something_impossible_is_refused(corpus, run, damage, message):
    state = load_checkpoint(run / LATEST)
    damage(state)
    torch.save(state, run / LATEST)
    with pytest.raises(CheckpointError, match=message):
        go_on(corpus, run, resume=run / LATEST)


@pytest.mark.parametrize("epochs", [2, 1])
def test_a_complete_run_says_so(corpus, run, capfd, epochs):
    go_on(corpus, run)
    assert "nothing left" not in capfd.readouterr().out
    go_on(corpus, run, epochs=epochs)
    assert f"nothing left to train: 2 of {epochs} steps are done (--epochs)" in capfd.readouterr().out
    assert load_checkpoint(run / LATEST)["step"] == 2


def test_two_new_runs_in_one_folder_keep_the_first(corpus, run):
    go_on(corpus, run)
    for _ in range(2):
        go_on(corpus, run, resume="none", epochs=1)
    assert load_checkpoint(run / f"{LATEST}.before")["step"] == 2
    assert json.loads((run / "log.txt.before").read_text().splitlines()[-1])["step"] == 2
    assert load_checkpoint(run / f"{LATEST}.before2")["step"] == 1 and len(log_of(run)) == 1
