"""Mining: right matches, spread points, the same table whoever mines, resumed runs, complaints."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.ct.geometry import index_to_world, world_to_index
from datasets.samples.correspondence_files import ROW_DTYPE
from datasets.samples.correspondences import CorrespondenceTable
from sam_embed.embeddings.embedding_store import (
    Embedding,
    EmbeddingCache,
    embedding_path,
    load_embedding,
    save_embedding,
)
from sam_embed.matching import mine_corpus as mining
from sam_embed.matching.mine import (
    MiningOptions,
    circle_of,
    circles_of,
    draw_points,
    lies_in_body,
    mine_case,
    partners_on,
)
from sam_embed.matching.mine_corpus import SHARD_FOLDER, mine_corpus
from scripts import mine_pairs
from tests.sam_fakes import AFFINE, patient_embedding, to_atlas

OPTIONS = MiningOptions(num_points=12, num_partners=2, seed=3, consensus_mm=0)  # consensus: its own tests


@pytest.fixture(scope="module")
def embed_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    for seed in range(4):
        save_embedding(folder, patient_embedding(seed))
    return folder


NAMES = [f"patient{seed}" for seed in range(4)]


def test_rows_are_right_matches(embed_dir, tmp_path):
    table = mine_corpus(embed_dir, NAMES, tmp_path, OPTIONS, {"commit": "abc"})
    assert len(table) == 4 * 12 * 2 and table.case_names == NAMES
    assert table.provenance["seed"] == 3 and table.provenance["commit"] == "abc"
    errors = []
    for row in table.rows:
        query_place = to_atlas(int(row["query_case"]), row["query_mm"].astype(float))
        key_place = to_atlas(int(row["key_case"]), row["key_mm"].astype(float))
        errors.append(np.linalg.norm(query_place - key_place))
    assert np.median(errors) < 3 and max(errors) < 10  # the fakes' grid is 8 mm
    assert (table.rows["query_case"] != table.rows["key_case"]).all()
    assert np.median(table.rows["cycle_mm"]) < 5 and table.rows["score"].min() > 0.95
    assert table.sources == {} and table.provenance["weights"]


def test_points_are_spread_inside_and_off_the_border():
    embedding = patient_embedding(0)
    points = draw_points(embedding, MiningOptions(num_points=60, border_mm=16))
    index = np.rint(world_to_index(AFFINE, points)).astype(int)
    assert embedding.body.numpy()[tuple(index.T)].all()
    air = np.argwhere(~embedding.body.numpy())
    assert min(np.linalg.norm((air - place) * 8, axis=1).min() for place in index) >= 8
    distances = np.linalg.norm(points[:, None] - points, axis=2) + np.diag([1e9] * len(points))
    plain = draw_points(embedding, MiningOptions(num_points=60, border_mm=16, seed=9))
    assert np.median(distances.min(axis=1)) > 15 and not np.array_equal(points, plain)
    np.testing.assert_array_equal(points, draw_points(embedding, MiningOptions(num_points=60, border_mm=16)))


def test_thin_slabs_still_get_points():
    embedding = patient_embedding(0)
    assert np.isfinite(draw_points(embedding, MiningOptions(num_points=5, border_mm=500))).all()


def test_partners_follow_on_a_circle_that_the_names_decide():
    names = [f"case{number}" for number in range(40)]
    circle = circle_of(names, 0)
    assert circle == circle_of(names[::-1], 0) and sorted(circle) == sorted(names)
    assert circle != sorted(names) and circle != circle_of(names, 1)
    partners = {name: partners_on(circle, name, 3) for name in names}
    assert all(len({name, *chosen}) == 4 for name, chosen in partners.items())
    keys = [key for chosen in partners.values() for key in chosen]
    assert all(keys.count(name) == 3 for name in names)
    with_one_more = circle_of([*names, "new"], 0)
    changed = [name for name in names if partners_on(with_one_more, name, 3) != partners[name]]
    assert len(changed) == 3  # a new case concerns those before it only
    assert sorted(partners_on(circle, "case7", 99)) == sorted(set(names) - {"case7"})


def test_scans_of_one_patient_are_never_partners():
    names = [f"case{number}" for number in range(12)]
    circle = circle_of(names, 0)
    patient_of = dict.fromkeys(circle[:3], "one") | dict.fromkeys(circle[3:5], "two")
    partners = {name: partners_on(circle, name, 3, patient_of) for name in names}
    assert partners[circle[0]] == circle[3:6] and partners[circle[2]] == circle[3:6]
    assert partners[circle[3]] == circle[5:8] and partners[circle[5]] == circle[6:9]
    assert partners[circle[-1]] == circle[:3], "other patients' scans may follow each other"
    assert partners_on(circle[:3], circle[0], 3, patient_of) == []


def test_a_case_without_other_patients_has_no_rows(embed_dir, tmp_path):
    patient_of = dict.fromkeys(NAMES[:3], "one")
    table = mine_corpus(embed_dir, NAMES, tmp_path, OPTIONS, patient_of=patient_of)
    pairs = {(int(row["query_case"]), int(row["key_case"])) for row in table.rows}
    assert all(3 in pair for pair in pairs) and len(pairs) == 3 + 2
    alone = mine_corpus(embed_dir, NAMES[:3], tmp_path / "alone", OPTIONS, patient_of=patient_of)
    assert len(alone) == 0


def test_ranks_and_resumed_runs_give_the_same_table(embed_dir, tmp_path, monkeypatch):
    whole = mine_corpus(embed_dir, NAMES, tmp_path / "whole", OPTIONS)
    assert mine_corpus(embed_dir, NAMES, tmp_path / "shared", OPTIONS, rank=1, world_size=2) is None
    mined = []
    monkeypatch.setattr(mining, "mine_case", lambda *args: mined.append(args[2]) or mine_case(*args))
    shared = mine_corpus(embed_dir, NAMES, tmp_path / "shared", OPTIONS, rank=0, world_size=2)
    assert mined == circle_of(NAMES, OPTIONS.seed)[:2]  # what the other process has done is not done again
    assert whole.rows.tobytes() == shared.rows.tobytes()
    mined.clear()
    other_seed = dataclasses.replace(OPTIONS, seed=4)
    mine_corpus(embed_dir, NAMES, tmp_path / "other", other_seed, rank=1, world_size=2)
    mine_corpus(embed_dir, NAMES, tmp_path / "other", OPTIONS)
    assert len(mined) == 2 + 4  # rows of another seed are not reused
    assert len(list((tmp_path / "other" / SHARD_FOLDER).iterdir())) == 4  # and are gone with the table that needed them


def test_a_finished_run_mines_nothing_and_a_new_case_its_neighbours_only(tmp_path, monkeypatch):
    mined = []
    monkeypatch.setattr(mining, "mine_case", lambda *args: mined.append(args[2]) or mine_case(*args))
    names = [f"patient{seed}" for seed in range(8)]
    for seed in range(8):
        save_embedding(tmp_path, dataclasses.replace(patient_embedding(seed), source=f"store:{seed}"))
    options = dataclasses.replace(OPTIONS, num_points=3)
    first = mine_corpus(tmp_path, names[:7], tmp_path, options)
    assert len(mined) == 7 and first.sources == {name: f"store:{name[-1]}" for name in names[:7]}
    rows = first.rows.tobytes()
    mined.clear()
    assert mine_corpus(tmp_path, names[:7], tmp_path, options).rows.tobytes() == rows
    assert mine_corpus(tmp_path, names[:7], tmp_path, options, rank=1, world_size=2) is None and not mined
    (tmp_path / "correspondences.npy").unlink()
    assert mine_corpus(tmp_path, names[:7], tmp_path, options).rows.tobytes() == rows
    assert not mined, "the rows are joined again from the shards"
    with_one_more = mine_corpus(tmp_path, names, tmp_path, options)
    circle = circle_of(names, options.seed)
    at = circle.index(names[7])
    assert set(mined) == {circle[at], circle[at - 1], circle[at - 2]}
    whole = mine_corpus(tmp_path, names, tmp_path / "whole", options)
    assert with_one_more.rows.tobytes() == whole.rows.tobytes()
    mined.clear()
    save_embedding(tmp_path, dataclasses.replace(patient_embedding(2), source="store:corrected"))
    mine_corpus(tmp_path, names, tmp_path, options)
    at = circle.index(names[2])
    assert set(mined) == {circle[at], circle[at - 1], circle[at - 2]}, "the corrected CT and those matched to it"


def test_waiting_lists_the_folder_and_gives_up(tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.npy" for number in range(50)]
    monkeypatch.setattr(Path, "exists", lambda _: pytest.fail("looks at a single file: slow on NFS"))
    looks = []

    def sleep(_: float) -> None:
        looks.append(1)
        if files:
            files.pop().touch()

    monkeypatch.setattr(mining.time, "sleep", sleep)
    mining._wait_for(list(files))
    assert len(looks) == 50
    monkeypatch.setattr(mining, "WAIT_LIMIT_S", -1.0)
    with pytest.raises(ValueError, match="1 of 1 cases were not mined by the other processes, first absent.npy"):
        mining._wait_for([tmp_path / "absent.npy"])


class CountedReads:
    """Stands for reading embeddings: counts how often, and how many of those read are still in memory."""

    def __init__(self, num_cases: int) -> None:
        self.names = [f"case{number:03d}" for number in range(num_cases)]
        self.num_reads, self.most_held, self._alive = 0, 0, weakref.WeakSet()

    def __call__(self, embed_dir, name: str) -> Embedding:
        fine = torch.zeros(2, 6, 6, 6, dtype=torch.float16)
        embedding = Embedding(name, fine, fine[:, ::2, ::2, ::2].clone(), AFFINE, AFFINE, fingerprint="counted")
        self._alive.add(embedding)
        self.num_reads += 1
        self.most_held = max(self.most_held, len(self._alive))
        return embedding


@pytest.mark.parametrize(
    "num_kept, most_reads", [(20, 1.1), (9, 1.1), (5, 6), (1, 9)], ids=["roomy", "just enough", "tight", "none"]
)
def test_a_corpus_is_read_about_once_and_never_held(num_kept, most_reads, tmp_path, monkeypatch):
    reads = CountedReads(num_cases=200)
    one_mb = reads(None, "case000").num_bytes / 2**20
    reads.num_reads = 0
    monkeypatch.setattr("sam_embed.embeddings.embedding_store.load_embedding", reads)
    monkeypatch.setattr(mining, "stored_header", lambda *_: {"fingerprint": "counted"})
    monkeypatch.setattr("sam_embed.matching.mine._mine_pair", lambda *_: np.zeros(1, dtype=ROW_DTYPE))
    options = MiningOptions(num_points=1, num_partners=8)
    table = mine_corpus("nowhere", reads.names, tmp_path, options, cache_mb=(num_kept + 0.5) * one_mb)
    assert len(table) == 200 * 8
    assert reads.num_reads <= most_reads * 200
    assert reads.most_held <= num_kept + 2  # the query and the key in use, should both have left the cache


def test_ranks_read_their_own_part_of_the_corpus(tmp_path, monkeypatch):
    reads = CountedReads(num_cases=200)
    monkeypatch.setattr("sam_embed.embeddings.embedding_store.load_embedding", reads)
    monkeypatch.setattr(mining, "stored_header", lambda *_: {"fingerprint": "counted"})
    monkeypatch.setattr("sam_embed.matching.mine._mine_pair", lambda *_: np.zeros(1, dtype=ROW_DTYPE))
    mine_corpus("nowhere", reads.names, tmp_path, MiningOptions(1, 8), rank=3, world_size=4)
    assert len(list((tmp_path / SHARD_FOLDER).iterdir())) == 50
    assert reads.num_reads == 50 + 8


def test_rows_mined_from_a_ct_that_has_changed_are_not_joined(tmp_path):
    circle = circle_of(NAMES, OPTIONS.seed)
    for source, changed in (("file:1:1", set()), ("file:1:2", {circle[3], circle[2], circle[1]})):
        for name in NAMES:
            embedding = dataclasses.replace(patient_embedding(int(name[-1])), source="file:1:1")
            save_embedding(tmp_path, embedding)
        mine_corpus(tmp_path, NAMES, tmp_path / source, OPTIONS, rank=1, world_size=2)  # the circle's second half
        for shard in (tmp_path / source / SHARD_FOLDER).iterdir():
            np.save(shard, np.load(shard)[:3])  # to be known again
        save_embedding(tmp_path, dataclasses.replace(load_embedding(tmp_path, circle[3]), source=source))
        table = mine_corpus(tmp_path, NAMES, tmp_path / source, OPTIONS)
        num_rows = {table.case_names[case]: int(num) for case, num in enumerate(np.diff(table.offsets))}
        assert num_rows == {name: 3 if name in circle[2:] and name not in changed else 24 for name in NAMES}


def test_a_run_killed_at_any_time_is_continued_to_the_same_table(embed_dir, tmp_path):
    script = Path(mine_pairs.__file__)
    command = ["--embed_dir", str(embed_dir), "--num_points", "100", "--device", "cpu", "--consensus_mm", "0"]
    killed = ["--output_dir", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, str(script), *command, *killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    shards = tmp_path / "killed" / SHARD_FOLDER
    while process.poll() is None and not list(shards.glob("*.npy")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it had not finished
    finished = {path: path.stat().st_mtime_ns for path in shards.glob("*.npy")}
    assert 1 <= len(finished) < len(NAMES) and not (tmp_path / "killed" / "correspondences.npy").exists()
    (shards / "left.tmp").touch()
    mine_pairs.main([*command, *killed])
    mine_pairs.main([*command, "--output_dir", str(tmp_path / "whole")])
    for name in ("correspondences.npy", "correspondences.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_score_floor_drops_rows(embed_dir, tmp_path):
    cache = EmbeddingCache(embed_dir)
    rows = mine_case(cache, NAMES, "patient0", NAMES[1:3], OPTIONS)
    floor = float(np.median(rows["score"]))
    kept = mine_case(cache, NAMES, "patient0", NAMES[1:3], dataclasses.replace(OPTIONS, min_score=floor))
    assert kept.tobytes() == rows[rows["score"] >= floor].tobytes()
    assert 0 < len(kept) < len(rows)


def test_command_writes_the_table(embed_dir, tmp_path, capsys):
    mine_pairs.main(["--embed_dir", str(embed_dir), "--output_dir", str(tmp_path), "--num_points", "5"])
    table = CorrespondenceTable.load(tmp_path)
    assert len(table) == 4 * 5 * 3 and '"num_rows": 60' in capsys.readouterr().out
    assert table.provenance["spacing_mm"] == [8.0, 8.0, 8.0] and (tmp_path / "mine_run.json").exists()


def test_held_out_cases_are_paired_with_held_out_ones(embed_dir, tmp_path):
    """Else a validation section of 20 beside 2,000 training cases would have no pair of two held-out cases."""
    named = {"training": NAMES[:2], "validation": NAMES[2:]}
    listed = {section: [{"image": f"{name}.nii.gz"} for name in names] for section, names in named.items()}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    command = ["--embed_dir", str(embed_dir), "--output_dir", str(tmp_path), "--num_points", "5"]
    mine_pairs.main([*command, "--json_list", str(tmp_path / "list.json")])
    table = CorrespondenceTable.load(tmp_path)
    pairs = {(table.case_names[row["query_case"]], table.case_names[row["key_case"]]) for row in table.rows}
    assert pairs == {pair for names in named.values() for pair in itertools.permutations(names, 2)}
    grouped = dict.fromkeys(NAMES[:3], "one")
    listed = {"training": [{"image": f"{name}.nii.gz", "group": grouped.get(name, "")} for name in NAMES]}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    mine_pairs.main([*command, "--json_list", str(tmp_path / "list.json")])
    table = CorrespondenceTable.load(tmp_path)
    assert len(table) and ((table.rows["query_case"] == 3) | (table.rows["key_case"] == 3)).all()
    circles = circles_of(NAMES, [NAMES[:3], NAMES[3:]], 0)
    assert circles[NAMES[0]] == circle_of(NAMES[:3], 0)
    assert circles[NAMES[3]] == circle_of(NAMES, 0), "alone in its section: with whom there is"


def test_listed_cases_without_embedding_are_left_out_and_named(embed_dir, tmp_path, capsys):
    listed = {"training": [{"image": f"patient{seed}.nii.gz"} for seed in (9, 2, 0, 1)]}
    (tmp_path / "list.json").write_text(json.dumps(listed))
    command = ["--embed_dir", str(embed_dir), "--output_dir", str(tmp_path), "--num_points", "5"]
    command += ["--json_list", str(tmp_path / "list.json")]
    mine_pairs.main(command)
    assert CorrespondenceTable.load(tmp_path).case_names == ["patient0", "patient1", "patient2"]
    told = capsys.readouterr().err
    assert "1 of 4 listed cases have no embedding" in told and "patient9; scripts/generate_sam_embeddings.py" in told
    assert mine_pairs.choose_cases(mine_pairs.make_flags().parse_args(command), rank=1)[0] == [NAMES[:3], []]
    assert not capsys.readouterr().err
    (tmp_path / "list.json").write_text(json.dumps({"training": listed["training"][:2]}))
    with pytest.raises(ValueError, match="at least 2 embedded cases, found 1"):
        mine_pairs.main(command)


def test_what_cannot_be_mined_is_named(embed_dir, tmp_path):
    with pytest.raises(ValueError, match="absent"):
        mine_corpus(embed_dir, [*NAMES, "absent"], tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="at least 2"):
        mine_corpus(embed_dir, NAMES[:1], tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="--num_points"):
        MiningOptions(num_points=0)
    stranger = patient_embedding(9)
    torch.manual_seed(0)
    object.__setattr__(stranger, "fingerprint", "other")
    save_embedding(embed_dir, stranger)
    with pytest.raises(ValueError, match="different weights"):
        mine_corpus(embed_dir, [*NAMES, "patient9"], tmp_path, OPTIONS)
    assert load_embedding(embed_dir, "patient9").fingerprint == "other"
    embedding_path(embed_dir, "patient9").unlink()


def test_matches_in_air_are_dropped():
    embedding = patient_embedding(0)
    body = torch.zeros(embedding.fine.shape[1:], dtype=torch.bool)
    body[2, 3, 1] = True
    embedding = dataclasses.replace(embedding, body=body)
    index = np.array([[2, 3, 1], [2.4, 3.4, 0.6], [2.6, 3, 1], [0, 0, 0], [-9, 3, 1]], dtype=float)
    points_mm = np.concatenate([index_to_world(embedding.fine_affine, index), np.full((1, 3), np.nan)])
    assert lies_in_body(embedding, points_mm).tolist() == [True, True, False, False, False, False]
