"""The benchmark of SAM's recipes: each is one that train_sam.py takes, and its table says what was measured."""

from pathlib import Path

import pytest

from benchmarks.sam_training import RECIPES, Recipe, as_table, make_flags, training_words
from scripts import train_sam


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_a_training_with_a_valid_loss_and_views(name, tmp_path):
    flags = make_flags().parse_args(["--batch_factor", "2", "--seed", "5"])
    words = [str(word) for word in training_words(RECIPES[name], flags, tmp_path)]
    parsed = train_sam.make_flags().parse_args([*words, "--output_dir", str(tmp_path)])
    assert parsed.batch_size == 2 * RECIPES[name].batch_size and parsed.seed == 5
    assert parsed.time_limit_min == flags.time_limit_min
    assert train_sam.view_options(parsed).shape == tuple(parsed.view_shape)


def test_the_configuration_for_gpus_is_the_measured_recipe():
    common = ["--data_dir", "d", "--json_list", "l", "--store_dir", "s", "--output_dir", "o"]
    recipe = RECIPES["full_output"]
    config = Path(__file__).resolve().parents[1] / "configs"
    shipped = train_sam.make_flags().parse_args(["--config", str(config / "sam_gpu.yaml"), *common])
    measured = train_sam.make_flags().parse_args(["--config", str(config / recipe.config), *recipe.flags, *common])
    free = {"config", "steps", "time_limit_min", "batch_size", "num_workers", "val_cases", "val_freq", "save_freq"}
    assert {name for name in vars(shipped) if vars(shipped)[name] != vars(measured)[name]} <= free


def test_dear_recipes_are_judged_on_fewer_cases():
    assert Recipe("", "").num_judged(20) == 20
    assert Recipe("", "", cost=4).num_judged(20) == 10
    assert Recipe("", "", cost=1e6).num_judged(20) == 2


def test_the_table_lists_baselines_first_and_recipes_from_best_to_worst():
    def figures(median: float) -> dict:
        return {"median_mm": median, "mean_mm": median + 1, "p90_mm": 3 * median, "share_within_10mm": 0.875}

    found = {
        "wide": {"title": "more", "steps": 7, "num_cases": 4, "sam": figures(9.0)},
        "base": {"title": "less", "steps": 8, "num_cases": 4, "sam": figures(4.0)},
    }
    found["base"] |= {"body_box": figures(50.0), "body_affine": figures(40.0)}
    lines = as_table(found).splitlines()
    assert [line.split("|")[1].split()[0].strip(":`") for line in lines[2:]] == ["same", "affine", "base", "wide"]
    assert lines[4].endswith("| 8 | 4 | 4.0 | 5.0 | 12.0 | 88% |")
