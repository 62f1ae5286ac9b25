"""The stages of the comparison as jobs: every line here is a command of the README."""

import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.comparison.arms import ARMS, SCRATCH_OWN, UNTRAINED
from benchmarks.comparison.jobs import Call, Job
from benchmarks.comparison.settings import Settings
from benchmarks.results import words
from datasets.phantom.cases import GENERATOR
from datasets.samples.pairings import PAIRINGS, PairingOptions
from engine.flags import REPOSITORY

LEARNING_STAGES = ("pretrain", "probe", "finetune")
STEPS_PER_EPOCH = 20
USUAL_CROPS = 2  # of a sample, in which --pretrain_steps is counted
CROPS_LOADED = 3  # of each place: as it is, and at most two views
MAX_SHARDS = 8
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


@dataclass(frozen=True)
class Plan:
    """Where everything lies and what is to be done.

    Attributes:
        root: the comparison's folder.
        sam_checkpoint: a trained SAM, or None to train one.
        device: auto, cpu or cuda.
        num_cpus: cores for the stages that prepare data.
    """

    root: Path
    settings: Settings
    arms: tuple[str, ...]
    sam_checkpoint: Path | None = None
    device: str = "auto"
    num_cpus: int = 1

    # Folders: data sets of other sizes, seeds or generators lie beside each other

    @property
    def data(self) -> Path:
        s = self.settings
        sizes = f"{s.num_unlabelled}_{s.num_labelled}_{s.num_test}"
        return self.root / f"data_{sizes}_seed{s.data_seed}_generator{GENERATOR}"

    @property
    def phantoms(self) -> Path:
        return self.data / "phantoms"

    @property
    def store(self) -> Path:
        """The volumes that are pretrained with and finetuned."""
        return self.data / f"store_{self.settings.spacing_mm:g}mm"

    @property
    def sam_store(self) -> Path:
        """The volumes that SAM reads; the same folder where the voxel sizes agree."""
        return self.data / f"store_{self.settings.sam_spacing_mm:g}mm"

    def list_of(self, which: str) -> Path:
        """The data list of `unlabelled` or `labelled` cases."""
        return self.data / f"{which}.json"

    def data_flags(self, which: str, store: Path | None = None) -> dict[str, Path]:
        """The flags by which entry points find those cases and their volumes."""
        return {"data_dir": self.phantoms, "json_list": self.list_of(which), "store_dir": store or self.store}

    def tables(self, which: str) -> Path:
        """The folder of the `sam` or `true` table of pairs."""
        return self.data / f"pairs_{which}"

    def evaluation(self, arm: str, shots: int, seed: int) -> Path:
        """Where one finetuning is judged."""
        return self.root / "finetune" / arm / f"{shots}shot" / f"seed{seed}" / "evaluation"

    # Stages: batches of jobs, each batch after the one before

    def batches(self, stage: str) -> list[list[Job]]:
        """The jobs of a stage."""
        match stage:
            case "data":
                return [[self.make_phantoms], list(self.make_lists.values()), list(self.make_stores.values())]
            case "sam":
                return [self.train_sam, [self.make_true_pairs, *self.embed], self.mine]
            case "pretrain":
                return [list(self.pretrain.values())]
            case "probe":
                return [list(self.probe.values())]
            case "finetune":
                return [self.finetune]

    def num_threads(self, stage: str, num_jobs: int) -> int:
        """CPU threads of each of a batch's jobs."""
        if stage in LEARNING_STAGES:
            return self.settings.num_threads
        return max(1, self.num_cpus // max(1, num_jobs))

    @cached_property
    def make_phantoms(self) -> Job:
        s = self.settings
        call = Call.of(
            "scripts.make_phantom_dataset",
            out_dir=self.phantoms,
            num_unlabelled=s.num_unlabelled,
            num_labelled=s.num_labelled + s.num_test,
            seed=s.data_seed,
            num_workers=self.num_cpus,
        )
        return Job("data/phantoms", (call,))

    @cached_property
    def make_lists(self) -> dict[str, Job]:
        held_out = {"unlabelled": self.settings.num_held_out, "labelled": self.settings.num_test}
        return {which: self._make_list(which, number) for which, number in held_out.items()}

    def _make_list(self, which: str, num_held_out: int) -> Job:
        call = Call.of(
            "scripts.create_json",
            data_dir=self.phantoms,
            output=self.list_of(which),
            cases=which,
            num_validation=num_held_out,
            num_workers=self.half_of_cpus,
        )
        return Job(f"data/{which}_list", (call,), after=(self.make_phantoms,))

    @property
    def half_of_cpus(self) -> int:
        return max(1, self.num_cpus // 2)

    @cached_property
    def make_stores(self) -> dict[str, Job]:
        """By what they hold: `unlabelled`, `labelled`, and `sam` for what SAM reads, if those are other volumes."""
        stores = {which: self._make_store(which, which, self.store) for which in self.make_lists}
        if self.sam_store != self.store:
            stores["sam"] = self._make_store("sam", "unlabelled", self.sam_store)
        return stores

    @property
    def make_sam_store(self) -> Job:
        return self.make_stores.get("sam", self.make_stores["unlabelled"])

    def _make_store(self, name: str, which: str, folder: Path) -> Job:
        spacing_mm = self.settings.spacing_mm if folder == self.store else self.settings.sam_spacing_mm
        flags = {**self.data_flags(which, folder), "spacing_mm": spacing_mm, "num_workers": self.half_of_cpus}
        call = Call.of("scripts.prepare_volumes", **flags)
        return Job(f"data/{name}_store", (call,), after=(self.make_lists[which],))

    @cached_property
    def make_true_pairs(self) -> Job:
        s = self.settings
        call = Call.of(
            "benchmarks.comparison.true_pairs",
            landmark_dir=self.phantoms / "landmarks",
            store_dir=self.store,
            json_list=self.list_of("unlabelled"),
            output_dir=self.tables("true"),
            num_points=s.num_points,
            num_partners=s.num_partners,
            num_workers=self.half_of_cpus,
        )
        return Job("sam/true_pairs", (call,), self.tables("true"), (self.make_stores["unlabelled"],))

    @cached_property
    def train_sam(self) -> list[Job]:
        """One job, or none where a trained SAM is given."""
        if self.sam_checkpoint is not None:
            return []
        folder, further = self.root / "sam", shlex.split(self.settings.sam_flags)
        call = Call.of(
            "scripts.train_sam",
            *further,
            config=REPOSITORY / self.settings.sam_config,
            **self.data_flags("unlabelled", self.sam_store),
            output_dir=folder,
            val_cases=0,
            device=self.device,
        )
        return [Job("sam/train", (call,), folder, (self.make_sam_store,))]

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

    @property
    def num_shards(self) -> int:
        """How many processes share embedding and mining; all of them must run at once."""
        return max(1, min(self.settings.num_parallel, MAX_SHARDS, self.num_cpus))

    @cached_property
    def embed(self) -> list[Job]:
        call = Call.of(
            "scripts.generate_sam_embeddings",
            checkpoint_file=self.sam_checkpoint or self.root / "sam" / "checkpoint_best.pth",
            store_dir=self.sam_store,
            json_list=self.list_of("unlabelled"),
            data_dir=self.phantoms,
            embed_dir=self.tables("sam"),
            device=self.device,
        )
        return self._shards("sam/embed", call, (self.make_sam_store, *self.train_sam))

    @cached_property
    def mine(self) -> list[Job]:
        s = self.settings
        call = Call.of(
            "scripts.mine_pairs",
            embed_dir=self.tables("sam"),
            json_list=self.list_of("unlabelled"),
            sections=("training", "validation"),
            num_points=s.num_points,
            num_partners=s.num_partners,
        )
        return self._shards("sam/mine", call, (self.embed[0],))

    def _shards(self, name: str, call: Call, after: tuple[Job, ...]) -> list[Job]:
        """The same command in several processes, each with its share of the cases; the first one joins them."""
        count = str(self.num_shards)
        return [
            Job(f"{name}{rank}", (call,), after=after, environment={"RANK": str(rank), "WORLD_SIZE": count})
            for rank in range(self.num_shards)
        ]

    @property
    def pretrained_arms(self) -> tuple[str, ...]:
        return tuple(arm for arm in self.arms if arm not in UNTRAINED)

    @cached_property
    def pretrain(self) -> dict[tuple[str, int], Job]:
        """By arm and seed of the pretraining."""
        seeds = self.settings.pretrain_seeds
        return {(arm, seed): self._pretrain(arm, seed) for seed in seeds for arm in self.pretrained_arms}

    def pretrain_seed(self, seed: int) -> int:
        """The seed of the pretraining that a finetuning starts from: the n-th from the n-th, then round again."""
        s = self.settings
        return s.pretrain_seeds[s.seeds.index(seed) % len(s.pretrain_seeds)]

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
        if recipe.table is not None:
            flags += words(table_file=self.tables(recipe.table) / "correspondences.npy")
        alice_flags = s.alice_flags if recipe.method == "alice" else ""
        flags += (*recipe.flags, *shlex.split(f"{s.pretrain_flags} {alice_flags}"))
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

    def pretraining(self, arm: str, seed: int) -> Job:
        """What a finetuning or a probe starts from."""
        return self.pretrain[arm, self.pretrain_seed(seed)]

    def weights(self, arm: str, seed: int) -> Path:
        return self.pretraining(arm, seed).folder / self.extracted

    @cached_property
    def probe(self) -> dict[int, Job]:
        """Frozen encoders beside untrained ones, taught by the fewest labelled cases: by the seed of the split."""
        return {seed: self._probe(seed) for seed in self.settings.seeds if self.pretrained_arms}

    def _probe(self, seed: int) -> Job:
        folder = self.root / "probe" / f"seed{seed}"
        call = Call.of(
            "scripts.probe_features",
            weights=[self.weights(arm, seed) for arm in self.pretrained_arms],
            **self.data_flags("labelled"),
            num_labelled=min(self.settings.shots),
            fold=seed,
            num_voxels=200,
            overlap=0.25,
            window_batch=8,
            device=self.device,
            num_workers=0,
            output=folder / "probe.json",
        )
        after = (self.make_stores["labelled"], *(self.pretraining(arm, seed) for arm in self.pretrained_arms))
        return Job(f"probe/seed{seed}", (call,), folder, after)

    @cached_property
    def finetune(self) -> list[Job]:
        """Seeds first, arms last: what is compared runs side by side, and an early look shows every arm."""
        s = self.settings
        return [self._finetune(arm, shots, seed) for seed in s.seeds for shots in s.shots for arm in self.arms]

    def _finetune(self, arm: str, shots: int, seed: int) -> Job:
        s, evaluation = self.settings, self.evaluation(arm, shots, seed)
        shared = {**self.data_flags("labelled"), "device": self.device}
        start = words(weights="none")
        if arm not in UNTRAINED:
            start = words(weights=self.weights(arm, seed), weights_part=s.weights_part)
            start += tuple(shlex.split(s.weights_flags))
        further = shlex.split(f"{s.finetune_flags} {s.scratch_flags if arm == SCRATCH_OWN else ''}")
        train = Call.of(
            "scripts.finetune_segmentation",
            *(*start, *further),
            config=REPOSITORY / "configs" / "finetune_comparison.yaml",
            **shared,
            output_dir=evaluation.parent,
            **self._network(s.roi),
            num_labelled=shots,
            fold=seed,
            seed=seed,
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
        after = (self.make_stores["labelled"], *([] if arm in UNTRAINED else [self.pretraining(arm, seed)]))
        name = f"finetune/{arm}_{shots}shot_seed{seed}"
        return Job(name, (train, judge), evaluation.parent, after, scraps=("*.pth",))
