"""The data of a pretraining run: the volume store, the samples to train and to validate with, the voxels to probe."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.ct.images import CT, NAMES
from datasets.lists.data_list import Case, DataListError, load_data_list
from datasets.lists.label_classes import read_classes
from datasets.samples.anatomy import AnatomyPoints
from datasets.samples.correspondences import CorrespondenceTable
from datasets.samples.crops import CropOptions
from datasets.samples.dataset import CropDataset, CutSamples
from datasets.samples.distort import DistortOptions
from datasets.samples.loader import make_pair_loader
from datasets.samples.masks import MaskOptions
from datasets.samples.pairings import PAIRINGS, PairingOptions
from datasets.samples.probe_voxels import ProbeVoxels, choose_probe_voxels, split_probe_cases
from datasets.store.format import checksum_of
from datasets.store.volumes import VolumeStore, fill_store, parse_spacing
from engine import distributed
from engine.anatomy import open_anatomy
from engine.distributed import World
from engine.flags import options_of
from models.methods.method import Method

VALIDATION_SEED = 1_000_003

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The volumes of a run: the store, samples to train and to validate with (None without held-out cases), and the
    voxels to probe."""

    store: VolumeStore
    training: CropDataset
    validation: CropDataset | None
    probe: ProbeVoxels | None = None  # on rank 0, with --probe_freq

    def digests(self) -> dict[str, str | None]:
        """Of what the training samples are cut from: the cases in their order, and the correspondence table; of SAM's
        vectors where the method asks for them."""
        table, anatomy = self.training.pairing.table, self.training.anatomy
        names = json.dumps(self.training.names).encode()
        digests = {"cases": checksum_of(names), "table": None if table is None else table.digest()}
        return digests if anatomy is None else digests | {"anatomy": anatomy.digest}


def open_data(flags, method: Method | type[Method], world: World) -> Data:
    """Open the volume store, building what is missing of it on rank 0; make the datasets with the method's views."""
    cases = {
        section: load_data_list(flags.json_list, flags.data_dir, section, must_exist=False)
        for section in ("training", "validation")
    }
    if not cases["training"]:
        raise DataListError(f"--json_list {flags.json_list}: no cases in 'training', so there is nothing to train with")
    store_dir = Path(flags.store_dir or Path(flags.output_dir) / "store")
    probed = probe_cases(flags)
    if world.is_main:
        everything = cases["training"] + cases["validation"] + probed[0] + probed[1]
        fill_store(everything, store_dir, flags.spacing_mm, flags.num_workers)
    distributed.wait_for_all(world)
    spacing = None if flags.spacing_mm is None else parse_spacing(flags.spacing_mm) or "native"
    store = VolumeStore(store_dir, expected_spacing_mm=spacing)
    check_probe(flags, store)
    check_channels(store)
    names = {section: [case.name for case in listed if case.name in store] for section, listed in cases.items()}
    if not flags.val_freq:
        names["validation"] = []
    patient_of = {case.name: case.patient for listed in cases.values() for case in listed}
    table = load_table(flags)
    if table is not None and store.spacing_mm is None and world.is_main:
        logger.warning(
            "%s keeps each volume's own spacing: the two crops of a --pairing %s sample then show differently large "
            "parts of their patients; a store with --spacing_mm 2 1.5 1.5 would not", store_dir, flags.pairing,
        )  # fmt: skip
    anatomy = open_anatomy(flags, method.anatomy, store, names, world)
    training = make_dataset(flags, method.views, store, table, names["training"], flags.seed, patient_of, anatomy)
    validation = None
    if names["validation"]:
        seed = flags.seed + VALIDATION_SEED
        validation = make_dataset(flags, method.views, store, table, names["validation"], seed, patient_of, anatomy)
    probe = None
    if flags.probe_freq and world.is_main:
        classes = read_classes(flags.probe_json_list or flags.json_list)
        probe = choose_probe_voxels(store, classes, *probed, flags.probe_voxels)
    return Data(store, training, validation, probe)


def probe_cases(flags) -> tuple[list[Case], list[Case]]:
    """Labelled cases to teach and to judge the frozen probes of --probe_freq; none without it."""
    if not flags.probe_freq:
        return [], []
    return split_probe_cases(flags.probe_json_list or flags.json_list, flags.data_dir, max_cases=flags.probe_cases)


def check_probe(flags, store: VolumeStore) -> None:
    """Raise ValueError where frozen probes are asked for and the store holds no CT: probes read HU."""
    if flags.probe_freq and store.kind != CT:
        raise ValueError(
            f"--probe_freq {flags.probe_freq}: frozen probes read CT, not {NAMES[store.kind]}; set --probe_freq 0"
        )


def check_channels(store: VolumeStore) -> None:
    """Raise ValueError where a case has several channels: pretraining takes one."""
    several = next((name for name in store.names if store.record(name).num_channels > 1), None)
    if several is not None:
        raise ValueError(
            f"--store_dir {store.store_dir}: {several} has {store.record(several).num_channels} channels, pretraining "
            "takes one. List single channels (3-D files); weights of one channel are finetuned to several"
        )


def load_table(flags) -> CorrespondenceTable | None:
    """The correspondence table, where --pairing needs one.

    Raises:
        ValueError: no flag says where it is.
    """
    if not PAIRINGS[flags.pairing].needs_table:
        return None
    if not (flags.table_file or flags.embed_dir):
        raise ValueError(f"--pairing {flags.pairing} needs --embed_dir or --table_file (see scripts/mine_pairs.py)")
    return CorrespondenceTable.load(flags.table_file or flags.embed_dir)


def make_dataset(
    flags,
    views: Mapping[str, str],
    store: VolumeStore,
    table: CorrespondenceTable | None,
    names: Sequence[str],
    seed: int,
    patient_of: Mapping[str, str] | None = None,
    anatomy: AnatomyPoints | None = None,
) -> CropDataset:
    """Samples of the cases `names`, with a method's views.

    Args:
        flags: has --pairing and the flags of `PairingOptions` and `CropOptions`; of `MaskOptions` for views of blocks,
            of `DistortOptions` for distorted ones.
        patient_of: case -> patient, whose scans are not paired with each other; None = all are of different patients.
        anatomy: brings SAM's vectors inside the crops, for methods that ask for them.
    """
    crops = options_of(flags, CropOptions)
    pairing = PAIRINGS[flags.pairing](store, names, crops.roi, options_of(flags, PairingOptions), table, patient_of)
    masks = options_of(flags, MaskOptions) if "blocks" in views.values() else None
    distort = options_of(flags, DistortOptions) if "distorted" in views.values() else None
    return CropDataset(store, pairing, views, crops, masks, seed=seed, distort=distort, anatomy=anatomy)


def held_out_batches(flags, data: Data, world: World) -> Iterable[dict]:
    """This rank's share of the held-out samples, without views: the same every time, as many on every rank."""
    if data.validation is None:
        return []
    num_steps = -(-flags.num_val_pairs // (flags.batch_size * world.size))
    return make_pair_loader(
        CutSamples(data.validation), flags.batch_size, world.rank, world.size, min(flags.num_workers, 2),
        num_steps=num_steps,
    )  # fmt: skip
