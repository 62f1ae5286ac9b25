"""The golden data that every clone holds: small, a part of the whole set, and read where there is no other."""

import numpy as np
import pytest

from tests import golden_fill
from tests.golden_fill import REDUCED, fill, golden_folder, known, read_arrays
from tests.golden_inputs import INPUTS
from tests.make_reduced_golden import LARGE, MOST_BYTES
from tests.shared import shared_file


def test_the_folder_is_the_named_one_else_the_shared_one_else_the_clones(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ALICE_GOLDEN_DIR", "elsewhere")
    assert str(golden_folder()) == "elsewhere"
    monkeypatch.delenv("ALICE_GOLDEN_DIR")
    monkeypatch.setattr(golden_fill, "SHARED", tmp_path)
    assert golden_folder() == REDUCED
    (tmp_path / "golden").mkdir()
    assert golden_folder() == tmp_path / "golden"


def test_the_clones_set_is_small() -> None:
    assert sum(path.stat().st_size for path in REDUCED.iterdir()) <= MOST_BYTES


@pytest.mark.parametrize("name", sorted(path.name for path in REDUCED.glob("*.npz")))
def test_the_clones_set_is_a_part_of_the_whole_one(name: str) -> None:
    whole, ours = read_arrays(shared_file("golden", name)), read_arrays(REDUCED / name)
    assert INPUTS.get(name, {}).keys() <= ours.keys() <= whole.keys()
    for key, array in ours.items():
        assert array.dtype == whole[key].dtype
        if array.dtype.kind == "f" and array.size > LARGE:
            there, expected = known(whole[key], array)
            assert len(there) > 500 and there.equal(expected), key
        else:
            np.testing.assert_array_equal(array, whole[key], err_msg=key)


def test_values_follow_name_and_salt() -> None:
    plain = fill("encoder.weight", (4,), salt="")
    assert np.array_equal(plain, fill("encoder.weight", (4,), salt=""))
    assert not np.allclose(plain, fill("encoder.weight", (4,), salt="pepper."))
    assert not np.allclose(plain, fill("decoder.weight", (4,), salt=""))


def test_only_values_that_are_there_are_compared() -> None:
    ours, golden = known(np.array([1.0, 2.0]), np.array([np.nan, 3.0]))
    assert ours.tolist() == [2] and golden.tolist() == [3]
    with pytest.raises(AssertionError):
        known(np.array([1.0]), np.array([np.nan]))
    with pytest.raises(AssertionError):
        known(np.array([1.0, 2.0]), np.array([1.0]))
