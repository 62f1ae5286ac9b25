"""The comparison that proves the method: the same finetuning from weights that were pretrained in different ways.

    python -m benchmarks.compare_pretraining --preset gpu --output_dir results/comparison
    python -m benchmarks.compare_pretraining --preset cpu --output_dir results/comparison_cpu
    python -m benchmarks.compare_pretraining --output_dir results/comparison --stages data,sam,pretrain,probe

Arms: from scratch (and, with --scratch_flags, once more with those); masked image modelling alone; Alice with random,
IoU and SAM pairs; Alice without CASA; Alice with the phantoms' true correspondences, the upper bound of SAM pairs; and
its peers SimSiam and DINO with IoU pairs. All pretrain on the same unlabelled phantoms until they have seen as many
voxels (steps x batch x crops of a sample x voxels of a crop). Then each is finetuned with 1, 4, 15
(cpu: 1 and 4) labelled phantoms, three times, with the same cases, crops, seeds and schedule for every arm, and judged
on further phantoms; and the frozen encoders are probed, which chance moves less.

An arm is pretrained once, unless --pretrain_seeds names several: chance moves the Dice of one pretraining by a few
points, and without further ones no interval shows that.

Everything is done by the project's own commands; `OUTPUT_DIR/jobs` holds their words, seconds and logs. The same
command again goes on where it was stopped, and does anew what its flags have changed. `report/` receives comparison.md,
comparison.json and the figure dice_over_labels.png. gpu: estimated at under 25 minutes on one
GPU with 16 cores, not yet measured. cpu: two hours on 2 cores. smoke: two minutes, to see that it runs.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.comparison.arms import ARMS, SCRATCH_OWN
from benchmarks.comparison.jobs import Records, Workers
from benchmarks.comparison.settings import make_flags as make_setting_flags
from benchmarks.comparison.settings import settle
from benchmarks.comparison.stages import Plan
from engine.flags import RunInfo, run_main

STAGES = ("data", "sam", "pretrain", "probe", "finetune", "report")


def make_flags():
    """The command line."""
    return make_setting_flags(__doc__, list(ARMS), list(STAGES))


def chosen(given: str, known: list[str], flag: str) -> list[str]:
    """The words of a comma-separated flag, in the order of `known`.

    Raises:
        ValueError: a word that is not known, or none.
    """
    words = [word.strip() for word in given.split(",") if word.strip()]
    strangers = [word for word in words if word not in known]
    if strangers or not words:
        raise ValueError(f"{flag} {given}: expected some of {', '.join(known)}, separated by commas")
    return [word for word in known if word in words]


def make_plan(flags) -> Plan:
    """Check the flags; nothing is written."""
    arms = chosen(flags.arms, list(ARMS), "--arms")
    settings = settle(flags)
    checkpoint = Path(flags.sam_checkpoint).resolve() if flags.sam_checkpoint else None
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"--sam_checkpoint {flags.sam_checkpoint}: no such file (empty = train one)")
    root = Path(flags.output_dir).resolve()
    if not settings.scratch_flags:
        arms = [arm for arm in arms if arm != SCRATCH_OWN]
    return Plan(root, settings, tuple(arms), checkpoint, flags.device, flags.num_cpus)


def main(argv: list[str] | None = None) -> None:
    flags = make_flags().parse_args(argv)
    stages = chosen(flags.stages, list(STAGES), "--stages")
    plan = make_plan(flags)
    info = RunInfo.collect(flags)
    info.write(plan.root)
    records = Records(plan.root / "jobs")
    with Workers(plan.settings.num_parallel, records) as workers:
        for stage in stages:
            started = time.time()
            if stage == "report":
                report(plan, records, info.command)
                continue
            for batch in plan.batches(stage):
                workers.run(batch, plan.num_threads(stage, len(batch)))
            print(f"{stage}: {time.time() - started:.0f} s", flush=True)


def report(plan: Plan, records: Records, command: str) -> None:
    """Write the report and print its tables."""
    from benchmarks.comparison.report import TABLES, write_report

    write_report(plan, records, command)
    print((plan.root / "report" / TABLES).read_text(), flush=True)


if __name__ == "__main__":
    run_main(main)
