"""Everything before the weights as jobs: phantoms, lists, volume stores, SAM, embeddings and tables of pairs."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.comparison.arms import ARMS
from benchmarks.comparison.jobs import Call, Job
from benchmarks.comparison.settings import Settings
from datasets.phantom.cases import GENERATOR
from engine.flags import REPOSITORY

MAX_SHARDS = 8


@dataclass(frozen=True)
class DataPlan:
    """Where data, volumes, embeddings and tables lie, and the jobs that make them.

    Attributes:
        root: the comparison's folder.
        sam_checkpoint: a trained SAM, or None to train one.
        device: auto, cpu or cuda.
        num_cpus: cores for the stages that prepare data.
        real_ct: folder of the labelled real CT that frozen encoders are probed on too; None = they are not.
    """

    root: Path
    settings: Settings
    arms: tuple[str, ...]
    sam_checkpoint: Path | None = None
    device: str = "auto"
    num_cpus: int = 1
    real_ct: Path | None = None

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

    @property
    def tables_needed(self) -> set[str | None]:
        """The tables of pairs that arms read."""
        return {ARMS[arm].table for arm in self.arms}

    @property
    def needs_vectors(self) -> bool:
        """Whether anything reads SAM's embeddings."""
        return "sam" in self.tables_needed or any(ARMS[arm].reads_vectors for arm in self.arms)

    def sam_jobs(self) -> list[list[Job]]:
        """The stage `sam`, as far as the arms need it."""
        train = self.train_sam if self.needs_vectors or self.settings.memory else []
        true_pairs = [self.make_true_pairs] if "true" in self.tables_needed else []
        embed, mine = self.embed if self.needs_vectors else [], self.mine if "sam" in self.tables_needed else []
        return [train, [*true_pairs, *embed], mine]

    @property
    def sam_file(self) -> Path:
        """The weights of SAM, given or trained here."""
        return self.sam_checkpoint or self.root / "sam" / "checkpoint_best.pth"

    @property
    def num_shards(self) -> int:
        """How many processes share embedding and mining; all of them must run at once."""
        return max(1, min(self.settings.num_parallel, MAX_SHARDS, self.num_cpus))

    @cached_property
    def embed(self) -> list[Job]:
        call = Call.of(
            "scripts.generate_sam_embeddings",
            checkpoint_file=self.sam_file,
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
