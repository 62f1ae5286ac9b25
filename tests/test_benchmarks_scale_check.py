"""The rehearsal of a run on many ranks: it starts, shares, saves and resumes, and would show what went wrong."""

from benchmarks import scale_check


def test_a_run_on_many_ranks_goes_through():
    found = scale_check.run(scale_check.make_flags().parse_args(["--quick", "--num_ranks", "32"]))
    assert found["effective_batch"] == 64 and found["shares_are_whole"]
    assert found["steps"] == [1, 2, 3, 4] and len(set(found["lr"])) > 1
    assert found["peak_lr"] == max(found["lr"])
    (line,) = scale_check.rows(found)
    assert "steps in order" in line[3]
    (line,) = scale_check.rows(found | {"steps": [1, 2, 1, 2]})
    assert "WRONG" in line[3]
