"""The learning stages of the comparison as jobs: pretraining, probing and finetuning. Every job is a user's command."""

import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from benchmarks.comparison.arms import ARMS, SCRATCH_OWN, UNTRAINED
from benchmarks.comparison.data_stages import DataPlan
from benchmarks.comparison.jobs import Call, Job
from benchmarks.comparison.settings import RUN_SEEDS
from benchmarks.results import words
from datasets.samples.pairings import PAIRINGS, PairingOptions
from engine.flags import REPOSITORY

LEARNING_STAGES = ("pretrain", "probe", "finetune")
STEPS_PER_EPOCH = 20
USUAL_CROPS = 2  # of a sample, in which --pretrain_steps is counted
CROPS_LOADED = 3  # of each place: as it is, and at most two views
UNTRAINED_NETWORKS = "untrained"  # in place of an arm, of probes
PROBED = "probe.json"  # what a probe found, in its job's folder
BATCHES_AHEAD = 2  # that each loading process holds


def voxels_seen(flags: Mapping, num_steps: int, num_ranks: int = 1) -> int:
    """Voxels that a pretraining has seen: steps x batch x accumulated parts x ranks x crops of a sample x crop.

    Args:
        flags: of main_ddp.py, by name.
    """
    num_samples = num_steps * flags["batch_size"] * flags["accumulate_steps"] * num_ranks
    crop_voxels = flags["roi_z"] * flags["roi_y"] * flags["roi_x"]
    grid = PairingOptions(grid_bases=tuple(flags["grid_bases"]), grid_crops=flags["grid_crops"])
    return num_samples * PAIRINGS[flags["pairing"]].num_crops(grid) * crop_voxels


class Run(NamedTuple):
    """One finetuning of every arm with the same labelled cases, crops and new layers.

    Attributes:
        pretrain_seed: of the pretraining that it starts from.
        fold: of the labelled cases.
        seed: of finetuning; no two runs share it.
    """

    pretrain_seed: int
    fold: int
    seed: int


@dataclass(frozen=True)
class Plan(DataPlan):
    """What is to be done, from data to finetuned networks."""

    # Stages: batches of jobs, each batch after the one before

    def batches(self, stage: str) -> list[list[Job]]:
        """The jobs of a stage."""
        match stage:
            case "data":
                return [[self.make_phantoms], list(self.make_lists.values()), list(self.make_stores.values())]
            case "sam":
                return self.sam_jobs()
            case "pretrain":
                return [list(self.pretrain.values())]
            case "probe":
                return [[*self.probe.values(), *self.probe_real.values()]]
            case "finetune":
                return [list(self.finetune.values())]

    def num_threads(self, stage: str, num_jobs: int) -> int:
        """CPU threads of each of a batch's jobs."""
        if stage in LEARNING_STAGES:
            return self.settings.num_threads
        return max(1, self.num_cpus // max(1, num_jobs))

    def evaluation(self, arm: str, shots: int, run: Run) -> Path:
        """Where one finetuning is judged."""
        return self.root / "finetune" / arm / f"{shots}shot" / f"seed{run.seed}" / "evaluation"

    @property
    def pretrained_arms(self) -> tuple[str, ...]:
        return tuple(arm for arm in self.arms if arm not in UNTRAINED)

    @cached_property
    def pretrain(self) -> dict[tuple[str, int], Job]:
        """By arm and seed of the pretraining."""
        seeds = self.settings.pretrain_seeds
        return {(arm, seed): self._pretrain(arm, seed) for seed in seeds for arm in self.pretrained_arms}

    @cached_property
    def runs(self) -> list[Run]:
        """The n-th seed with the n-th pretraining, then round again; crossed, every pretraining with every seed.

        Crossed, a seed only chooses the labelled cases. Crops and new layers differ between pretrainings too, so that
        the luck of finetuning is part of an interval over pretrainings. Arms without a pretraining are finetuned as
        often: their luck then counts likewise.
        """
        s = self.settings
        if s.crossed_pretrainings:
            pretrainings = s.pretrain_seeds[: s.crossed_pretrainings]
            return [Run(first, seed, RUN_SEEDS * first + seed) for first in pretrainings for seed in s.seeds]
        count = len(s.pretrain_seeds)
        return [Run(s.pretrain_seeds[number % count], seed, seed) for number, seed in enumerate(s.seeds)]

    @property
    def units(self) -> list[list[Run]]:
        """Runs by what an interval is over: crossed, those of a pretraining are one unit, else each run is one."""
        if not self.settings.crossed_pretrainings:
            return [[run] for run in self.runs]
        return [list(runs) for _, runs in groupby(self.runs, key=lambda run: run.pretrain_seed)]

    def loaders(self, wanted: int, num_crops: int) -> int:
        """Loading processes of each run: as wanted, or none where shared memory has no room for their batches.

        Args:
            num_crops: float32 crops in one batch.
        """
        num_bytes = 4 * num_crops * math.prod(self.settings.roi) * (wanted + 1) * BATCHES_AHEAD
        needed = num_bytes * max(1, self.settings.num_parallel)
        shared = Path("/dev/shm")
        if wanted and shared.is_dir() and shutil.disk_usage(shared).free < needed:
            print(f"warning: {shared} has less than {needed / 2**30:.1f} GiB: loading without processes", flush=True)
            return 0
        return wanted

    def num_steps(self, arm: str) -> int:
        """Optimiser steps of an arm: as many voxels as `pretrain_steps` see with `USUAL_CROPS` crops a sample."""
        s, recipe = self.settings, ARMS[arm]
        usual_voxels, voxels = USUAL_CROPS * math.prod(s.roi), recipe.num_crops * math.prod(recipe.roi(s.roi))
        return max(1, round(s.pretrain_steps * usual_voxels / voxels))

    def _pretrain(self, arm: str, pretrain_seed: int) -> Job:
        s, num_steps = self.settings, self.num_steps(arm)
        folder = self.root / "pretrain" / arm / f"seed{pretrain_seed}"
        recipe, num_epochs = ARMS[arm], max(1, round(num_steps / STEPS_PER_EPOCH))
        flags = words(
            config=REPOSITORY / "configs" / recipe.config,
            method=recipe.method,
            pairing=recipe.pairing,
            **self.data_flags("unlabelled"),
            spacing_mm=s.spacing_mm,
            output_dir=folder,
            **self._network(recipe.roi(s.roi)),
            batch_size=s.pretrain_batch,
            epochs=num_epochs,
            steps_per_epoch=round(num_steps / num_epochs),
            warmup_epochs=0.1 * num_epochs,
            lr=s.pretrain_lr,
            min_lr=s.pretrain_lr / 100,
            val_freq=num_epochs,
            saveckp_freq=max(1, num_epochs // 8),
            log_freq=20,
            picture_freq=0,
            num_val_pairs=32,
            num_workers=self.loaders(s.pretrain_workers, recipe.num_crops * CROPS_LOADED * s.pretrain_batch),
            device=self.device,
            seed=pretrain_seed,
        )
        made_tables = {"sam": (self.mine[0],), "true": (self.make_true_pairs,), None: ()}
        after = (self.make_stores["unlabelled"], *made_tables[recipe.table])
        if recipe.reads_vectors:
            flags += words(embed_dir=self.tables("sam"))
            after += (self.embed[0],)
        if recipe.table is not None:
            flags += words(table_file=self.tables(recipe.table) / "correspondences.npy")
        alice_flags = s.alice_flags if recipe.method == "alice" else ""
        dense_flags = s.dense_flags if recipe.reads_vectors else ""
        flags += (*recipe.flags, *shlex.split(f"{s.pretrain_flags} {alice_flags} {dense_flags}"))
        extract = (str(folder / "checkpoint.pth"), str(folder / self.extracted), "--checkpoint_key", s.weights_from)
        calls = (Call("main_ddp", flags), Call("extract_backbone_weights", extract))
        return Job(f"pretrain/{arm}_seed{pretrain_seed}", calls, folder, after)

    def _network(self, roi: Sequence[int]) -> dict:
        """Network and crop D H W, as both pretraining and finetuning call them."""
        sides = dict(zip(("roi_z", "roi_y", "roi_x"), roi))
        return {"backbone": self.settings.backbone, "feature_size": self.settings.feature_size, **sides}

    @property
    def extracted(self) -> str:
        """The file of a pretraining's extracted weights; the name says of which module."""
        return f"{self.settings.weights_from}.safetensors"

    def weights(self, arm: str, pretrain_seed: int) -> Path:
        """What a finetuning or a probe starts from."""
        return self.pretrain[arm, pretrain_seed].folder / self.extracted

    @property
    def num_untrained(self) -> int:
        """Randomly initialised networks that are probed beside the pretrained ones."""
        return max(2, len(self.settings.pretrain_seeds))

    @cached_property
    def probe(self) -> dict[tuple[str, int, int], Job]:
        """Frozen encoders by arm, seed of the pretraining and fold of the fewest labelled cases, which teach.

        All pretrainings are probed with all of --seeds as folds. `UNTRAINED_NETWORKS` have no seed: theirs is 0.
        """
        if not self.pretrained_arms:
            return {}
        untrained = words(num_random=self.num_untrained, **self._network(self.settings.roi))
        jobs = {}
        for fold in self.settings.seeds:
            jobs[UNTRAINED_NETWORKS, 0, fold] = self._probe(UNTRAINED_NETWORKS, fold, untrained, ())
            for (arm, seed), pretraining in self.pretrain.items():
                flags = words(num_random=0, weights=self.weights(arm, seed))
                jobs[arm, seed, fold] = self._probe(f"{arm}_seed{seed}", fold, flags, (pretraining,))
        return jobs

    def _probe(self, networks: str, fold: int, flags: tuple[str, ...], after: tuple[Job, ...]) -> Job:
        s, name = self.settings, f"{networks}_fold{fold}"
        call = Call.of(
            "scripts.probe_features",
            *flags,
            **self.data_flags("labelled"),
            num_labelled=min(s.shots),
            fold=fold,
            num_voxels=200,
            mlp="true" if s.probe_mlp else None,
            overlap=0.25,
            window_batch=8,
            device=self.device,
            num_workers=0,
            output=self.root / "probe" / name / PROBED,
        )
        return Job(f"probe/{name}", (call,), self.root / "probe" / name, (self.make_stores["labelled"], *after))

    @cached_property
    def probe_real(self) -> dict[tuple[str, int], Job]:
        """The same encoders probed on the labelled real CT, by arm and seed of the pretraining."""
        return {key: self._probe_real(*key) for key in self.pretrain if self.real_ct is not None}

    def _probe_real(self, arm: str, pretrain_seed: int) -> Job:
        name = f"{arm}_seed{pretrain_seed}_real"
        call = Call.of(
            "benchmarks.comparison.real_ct",
            weights=self.weights(arm, pretrain_seed),
            ct_dir=self.real_ct,
            device=self.device,
            output=self.root / "probe" / name / PROBED,
        )
        return Job(f"probe/{name}", (call,), self.root / "probe" / name, (self.pretrain[arm, pretrain_seed],))

    @cached_property
    def finetune(self) -> dict[tuple[str, int, Run], Job]:
        """By arm, number of labelled cases and run.

        Runs first, arms last: what is compared runs side by side, and an early look shows every arm.
        """
        shots = self.settings.shots
        return {(arm, k, run): self._finetune(arm, k, run) for run in self.runs for k in shots for arm in self.arms}

    def _finetune(self, arm: str, shots: int, run: Run) -> Job:
        s, evaluation = self.settings, self.evaluation(arm, shots, run)
        shared = {**self.data_flags("labelled"), "device": self.device}
        start = words(weights="none")
        if arm not in UNTRAINED:
            start = words(weights=self.weights(arm, run.pretrain_seed), weights_part=s.weights_part)
            start += tuple(shlex.split(s.weights_flags))
        start += words(memory="true", sam_checkpoint=self.sam_file) if s.memory else ()
        further = shlex.split(f"{s.finetune_flags} {s.scratch_flags if arm == SCRATCH_OWN else ''}")
        train = Call.of(
            "scripts.finetune_segmentation",
            *(*start, *further),
            config=REPOSITORY / "configs" / "finetune_comparison.yaml",
            **shared,
            output_dir=evaluation.parent,
            **self._network(s.roi),
            num_labelled=shots,
            fold=run.fold,
            seed=run.seed,
            steps=s.finetune_steps,
            save_freq=s.finetune_steps,
            warmup_steps=max(1, s.finetune_steps // 20),
            batch_size=s.finetune_batch,
            lr=s.finetune_lr,
            min_lr=s.finetune_lr / 100,
            num_workers=self.loaders(s.finetune_workers, 2 * s.finetune_batch),
        )
        best = words(checkpoint_file=evaluation.parent / "best.pth", **shared, output_dir=evaluation)
        sliding = words(nsd_mm=0, overlap=0.25, window_batch=8)
        judge = Call("scripts.evaluate_segmentation", (*best, "--no_pictures", *sliding))
        after = (self.make_stores["labelled"], *(self.train_sam if s.memory else ()))
        after += () if arm in UNTRAINED else (self.pretrain[arm, run.pretrain_seed],)
        name = f"finetune/{arm}_{shots}shot_seed{run.seed}"
        return Job(name, (train, judge), evaluation.parent, after, scraps=("*.pth",))
