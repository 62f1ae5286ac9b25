"""The comparison that proves the method: the same finetuning from weights that were pretrained in different ways.

    python -m benchmarks.compare_pretraining --preset gpu --output_dir results/comparison
    python -m benchmarks.compare_pretraining --output_dir results/comparison --stages data,sam,pretrain,probe
    python -m benchmarks.compare_pretraining --preset anatomy --output_dir results/anatomy
    python -m benchmarks.compare_pretraining --preset anatomy --output_dir results/anatomy --arms mim,dense,alice \\
        --pretrain_seeds 0 1 --real_ct ../shared/ct --stages data,sam,pretrain,probe,report

Arms: from scratch (and, with --scratch_flags, once more with those); masked image modelling alone; Alice with random,
IoU and SAM pairs; Alice without CASA; Alice with the phantoms' true correspondences, the upper bound of SAM pairs;
and its peers: SimSiam and DINO with IoU pairs, VoCo in one patient and in two, CAiD. All pretrain on the same
unlabelled phantoms until they have seen as many voxels (steps x batch x crops of a sample x voxels of a crop). Then
each is finetuned with 1, 4, 15 (cpu: 1 and 4) labelled phantoms, three times, with the same cases, crops, seeds and
schedule for every arm, and judged on further phantoms; and the frozen encoders are probed, which chance moves less.

An arm is pretrained once, unless --pretrain_seeds names several: chance moves the Dice of one pretraining by a few
points, and without further ones no interval shows that.

The preset anatomy asks whether dense anatomy pays, with little noise and the SAM that ships: five pretrainings an arm,
each probed with five labelled cases (k-NN, linear, and a per-voxel MLP with Dice over whole volumes), three of them
finetuned with each of five choices of 1, 4 and 15 labelled cases, and judged without memory and with it. Differences
have intervals over pretrainings (benchmarks/comparison/claims.py). Its phantoms are of a seed that no recipe was chosen
with; to choose one, take another seed (--data_seed 10 or 11).

The preset eva judges frozen encoders as kaiko.ai's eva does radiology's: SwinUNETR's decoder is trained on top, five
times, with all 15 labelled phantoms; a frozen random encoder and a whole training from scratch stand beside it.

Everything is done by the project's own commands; `OUTPUT_DIR/jobs` holds their words, seconds and logs. The same
command again goes on where it was stopped, and does anew what its flags have changed. `report/` receives comparison.md,
comparison.json and the figure dice_over_labels.png, of what is done; the report stage alone can be run at any time.

gpu and eva: estimated at under 25 minutes on one GPU with 16 cores, not yet measured. cpu: two hours on 2 cores.
anatomy: a pretraining is to take a quarter of an hour on one core; the whole preset a day on 2 cores, not yet
measured. smoke: two minutes, to see that it runs.
"""

import time
from pathlib import Path

from benchmarks.comparison.arms import ARMS, SCRATCH_OWN
from benchmarks.comparison.jobs import Records, make_pool, run_jobs
from benchmarks.comparison.settings import PRESETS, add_settings, resolve
from benchmarks.comparison.stages import Plan
from benchmarks.real_ct_matching import ABDOMEN
from benchmarks.results import chosen
from engine.flags import RunInfo, available_cpus, make_parser, run_main

STAGES = ("data", "sam", "pretrain", "probe", "finetune", "report")


def make_flags():
    """The command line: where, which stages, and every setting (unset = the preset's)."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=str, required=True, help="everything goes here; the same command again goes on there")
    add("--preset", type=str, choices=list(PRESETS), default="gpu", help="defaults of all settings")
    add("--stages", type=str, default=",".join(STAGES), help="which of these to run, separated by commas")
    add("--real_ct", type=str, default="", help="folder of the labelled real CT; also probe on it; empty = do not")
    add("--device", type=str, choices=["auto", "cpu", "cuda"], default="auto", help="auto = CUDA where there is one")
    add("--num_cpus", type=int, default=available_cpus(), help="cores for the stages that prepare data")
    add_settings(parser.add_argument_group("settings (unset = the preset's; shown: gpu's)"))
    return parser


def make_plan(flags) -> Plan:
    """Check the flags; nothing is written."""
    settings = resolve(flags)
    arms = chosen(settings.arms.split(","), list(ARMS), "--arms")
    checkpoint = Path(settings.sam_checkpoint).resolve() if settings.sam_checkpoint else None
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"--sam_checkpoint {settings.sam_checkpoint}: no such file (empty = train one)")
    real_ct = Path(flags.real_ct).resolve() if flags.real_ct else None
    if real_ct is not None and not (real_ct / f"{ABDOMEN}_label_names.json").is_file():
        raise ValueError(f"--real_ct {flags.real_ct}: expected a folder with {ABDOMEN}_label_names.json")
    root = Path(flags.output_dir).resolve()
    if not settings.scratch_flags:
        arms = [arm for arm in arms if arm != SCRATCH_OWN]
    return Plan(root, settings, tuple(arms), checkpoint, flags.device, flags.num_cpus, real_ct)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    stages = chosen(flags.stages.split(","), STAGES, "--stages")
    plan = make_plan(flags)
    info = RunInfo.collect(flags)
    info.write(plan.root)
    records = Records(plan.root / "jobs")
    with make_pool(plan.settings.num_parallel) as pool:
        for stage in stages:
            started = time.time()
            if stage == "report":
                from benchmarks.comparison.report import write_report  # the other stages start without matplotlib

                print(write_report(plan, records, info.command), flush=True)
                continue
            for batch in plan.batches(stage):
                run_jobs(batch, records, plan.num_threads(stage, len(batch)), pool)
            print(f"{stage}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    run_main(main)
