"""SAM's training recipes beside each other: the same phantoms, the same minutes, landmark errors on held-out patients.

    python -m benchmarks.sam_training --output_dir results/sam_training --time_limit_min 13           (2 CPU cores)
    python -m benchmarks.sam_training --output_dir results/sam_training --time_limit_min 6 --num_parallel 6 \\
        --num_workers 2 --num_training 100 --batch_factor 2                                     (one GPU, 16 cores)

Yan et al., "SAM", TMI 2022. Every recipe is `scripts/train_sam.py` with one configuration file and a few flags, judged
by `scripts/evaluate_matching.py` over all ordered pairs of the held-out phantoms. Finished recipes are kept: run it
again to add others with --recipes. Writes OUTPUT_DIR/results.json and results.md.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jsonargparse

from benchmarks.results import table, words
from datasets.store.files import write_text
from engine.flags import REPOSITORY, RunInfo, add_switch, git_commit, make_parser, run_main


@dataclass(frozen=True)
class Recipe:
    """One way to train SAM.

    Attributes:
        title: what it is, for the table.
        config: file of `configs/`.
        flags: added to it.
        batch_size: volumes a step on a CPU; `--batch_factor` multiplies it.
        cost: of matching one pair of volumes, in those of the base; dear recipes are judged on fewer cases.
    """

    title: str
    config: str
    flags: tuple[str, ...] = ()
    batch_size: int = 1
    cost: float = 1.0

    def num_judged(self, num_held_out: int) -> int:
        """Held-out cases to match with each other, so many that every recipe's judging takes about equally long."""
        return max(2, round(num_held_out / self.cost**0.5))


# Anatomy differs between patients by more than the base recipe bends a view, and contrast by more than it changes HU.
STRONG = ("--elastic_mm=20", "--max_scale=1.4", "--curve_hu=25", "--field_hu=40", "--noise_hu=60")
WIDE = ("--width=40", "--embed_dim=128")
FINE_GRID = ("--spacing_mm", "3", "3", "3", "--view_shape", "104", "72", "96")
FULL_OUTPUT = ("--stem_stride", "1", "1", "1")
HARD = (
    "--coarse_num_other=100",
    "--joint_num_keys=12000",
    "--joint_num_hard=2000",
    "--joint_num_drawn=1000",
    "--joint_num_other=500",
)

RECIPES = {
    "base": Recipe("sam_phantom.yaml", "sam_phantom.yaml"),
    "strong": Recipe("stronger deformation and contrast changes", "sam_phantom.yaml", (*STRONG,)),
    "wide": Recipe("the same, width 40, 128 channels", "sam_phantom.yaml", (*STRONG, *WIDE), cost=4),
    "fine_grid": Recipe("strong on a 3 mm grid", "sam_phantom.yaml", (*STRONG, *FINE_GRID), cost=2),
    "full_output": Recipe("strong, fine output per 4 mm voxel", "sam_phantom.yaml", (*STRONG, *FULL_OUTPUT), cost=8),
    "hard": Recipe("strong, hard and cross-case negatives", "sam_phantom.yaml", (*STRONG, *HARD), batch_size=2),
    "no_average": Recipe("base, last weights, no average", "sam_phantom.yaml", ("--ema_momentum", "0")),
    "published": Recipe("sam_published.yaml", "sam_published.yaml", batch_size=2, cost=32),
}


def make_flags() -> jsonargparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=str, default="results/sam_training", help="phantoms, checkpoints, results")
    add("--recipes", type=str, nargs="+", choices=list(RECIPES), default=list(RECIPES), help="which to train")
    add("--time_limit_min", type=float, default=13.0, help="training minutes of each recipe")
    add("--num_parallel", type=int, default=1, help="recipes that train side by side")
    add("--num_training", type=int, default=40, help="phantoms to train with")
    add("--num_held_out", type=int, default=20, help="phantoms to judge with")
    add("--num_judged", type=int, default=0, help="match only this many of them with each other; 0 = all")
    add("--num_workers", type=int, default=0, help="processes that make views, per recipe")
    add("--batch_factor", type=int, default=1, help="multiplies each recipe's batch size")
    add("--data_workers", type=int, default=2, help="processes that make phantoms")
    add("--seed", type=int, default=0, help="decides phantoms, weights and views")
    add_switch(parser, "--quick", False, "three training steps on a handful of phantoms, to see that it runs")
    return parser


def run_script(name: str, *more: str, **flags: object) -> None:
    """Run a script of the repository; its output goes to this process's."""
    subprocess.run([sys.executable, "-m", f"scripts.{name}", *words(**flags), *more], check=True, cwd=REPOSITORY)


def make_data(flags: jsonargparse.Namespace, folder: Path) -> None:
    """Phantoms, data list and store, as far as they are missing."""
    files, workers = data_flags(folder), {"num_workers": flags.data_workers}
    num_cases = flags.num_training + flags.num_held_out
    phantoms = {"out_dir": files["data_dir"], "num_unlabelled": num_cases, "num_labelled": 0, "seed": flags.seed}
    run_script("make_phantom_dataset", **phantoms, **workers)
    listed = {"data_dir": files["data_dir"], "output": files["json_list"], "num_validation": flags.num_held_out}
    run_script("create_json", **listed, **workers)
    run_script("prepare_volumes", **files, spacing_mm="native", **workers)


def data_flags(folder: Path) -> dict[str, Path]:
    """The three flags by which scripts find this benchmark's data."""
    return {"data_dir": folder / "data", "json_list": folder / "data.json", "store_dir": folder / "store"}


def train_and_judge(name: str, flags: jsonargparse.Namespace, folder: Path) -> dict:
    """One recipe's figures (of `scripts/evaluate_matching.py`), with `steps` and `train_s`."""
    recipe, output_dir = RECIPES[name], folder / name
    judged = output_dir / "matching.json"
    if not judged.exists():
        run_script("train_sam", *training_words(recipe, flags, folder), output_dir=output_dir)
        run_script(
            "evaluate_matching",
            **data_flags(folder),
            checkpoint_file=output_dir / "checkpoint.pth",
            sections="validation",
            landmark_dir=folder / "data" / "landmarks",
            output=judged,
            embed_dir=output_dir / "embeddings",
            baselines=name == flags.recipes[0],
            max_cases=recipe.num_judged(flags.num_judged or flags.num_held_out),
            num_points=0,
        )
    return {"title": recipe.title, **last_step(output_dir), **json.loads(judged.read_text())}


def training_words(recipe: Recipe, flags: jsonargparse.Namespace, folder: Path) -> tuple[str, ...]:
    """What `scripts/train_sam.py` gets, besides where its results go."""
    own = {"config": REPOSITORY / "configs" / recipe.config, **data_flags(folder)}
    shared = {
        "steps": 3 if flags.quick else 1_000_000,
        "time_limit_min": None if flags.quick else flags.time_limit_min,
        "batch_size": recipe.batch_size * flags.batch_factor,
        "num_workers": flags.num_workers,
        **{"val_cases": 0, "save_freq": 500, "log_freq": 50, "seed": flags.seed},
    }
    return (*words(**own), *recipe.flags, *words(**shared))


def last_step(output_dir: Path) -> dict:
    """Steps and seconds that a recipe trained, from its checkpoint."""
    import torch  # here: the other stages need none, and start much sooner without

    state = torch.load(output_dir / "checkpoint.pth", map_location="cpu", weights_only=True)
    return {"steps": state["step"], "train_s": round(state["elapsed_s"])}


def as_table(found: dict[str, dict]) -> str:
    """A Markdown table: the two baselines, then the recipes, lowest median first."""
    rows = []
    for result in [result for result in found.values() if "body_affine" in result][:1]:
        rows.append(("same relative position in the body box", "", result["num_cases"], result["body_box"]))
        rows.append(("affine fit of the body masks", "", result["num_cases"], result["body_affine"]))
    for name, result in sorted(found.items(), key=lambda item: item[1]["sam"]["median_mm"]):
        rows.append((f"`{name}`: {result['title']}", result["steps"], result["num_cases"], result["sam"]))
    lines = []
    for *what, errors in rows:
        millimetres = (f"{errors[key]:.1f}" for key in ("median_mm", "mean_mm", "p90_mm"))
        lines.append((*what, *millimetres, f"{errors['share_within_10mm']:.0%}"))
    header = ("recipe", "steps", "cases", "median", "mean", "90th percentile", "within 10 mm")
    return table(lines, header) + "\n"


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    if flags.quick:
        flags.num_training, flags.num_held_out = 2, 2
    folder = Path(flags.output_dir)
    RunInfo.collect(flags).write(folder)
    make_data(flags, folder)
    with ThreadPoolExecutor(max(1, flags.num_parallel)) as pool:
        running = {name: pool.submit(train_and_judge, name, flags, folder) for name in flags.recipes}
        found = {}
        for name, result in running.items():
            try:
                found[name] = result.result()
            except subprocess.CalledProcessError as error:
                print(f"{name} failed: {error}", file=sys.stderr)
    write_text(folder / "results.json", json.dumps({"commit": git_commit(), "recipes": found}, indent=1) + "\n")
    write_text(folder / "results.md", as_table(found))
    print(as_table(found))
    if len(found) < len(flags.recipes):
        raise ValueError(f"{len(flags.recipes) - len(found)} recipes failed; the reasons are above")


if __name__ == "__main__":
    run_main(main)
