"""The arms: what is done to the weights before finetuning, each as the flags in which it differs from the others."""

from dataclasses import dataclass

from benchmarks.results import words
from datasets.samples.pairings import PAIRINGS, PairingOptions

SCRATCH = "scratch"
SCRATCH_OWN = "scratch_own"  # --scratch_flags: what suits scratch better, or what else pretrained arms get, as freezing
UNTRAINED = (SCRATCH, SCRATCH_OWN)


@dataclass(frozen=True)
class Arm:
    """One way to start finetuning.

    Attributes:
        title: for tables and the figure.
        pairing: --pairing.
        flags: further flags of main_ddp.py, besides what all arms share.
        table: whose table of pairs it reads: "sam", "true" or None.
        method: --method.
        config: recipe in configs/; sizes, steps and learning rate are the benchmark's, unless `flags` say otherwise.
        crop_parts: D H W, by how much each side of the crop is smaller than that of other arms.
        reads_vectors: whether it reads SAM's embeddings (--embed_dir).
        grid: the rule's options as far as they decide how many crops a sample has; of VoCo's grids.
    """

    title: str
    pairing: str = ""
    flags: tuple[str, ...] = ()
    table: str | None = None
    method: str = "alice"
    config: str = "comparison.yaml"
    crop_parts: tuple[int, int, int] = (1, 1, 1)
    reads_vectors: bool = False
    grid: PairingOptions = PairingOptions()

    @property
    def num_crops(self) -> int:
        """Crops of one sample."""
        return PAIRINGS[self.pairing].num_crops(self.grid)

    def roi(self, usual: tuple[int, int, int]) -> tuple[int, int, int]:
        """The crop D H W, where all other arms have `usual`."""
        return tuple(side // parts for side, parts in zip(usual, self.crop_parts))


# A tenth of the default, beside reconstruction: with more, cls and CASA crowd out what reconstruction teaches the maps
# at strides 4 and 8 (benchmarks/LOG.md, "where crops lie").
ALICE = ("--lambda1", "0.1", "--lambda2", "0.1")

MIM = ("--lambda1", "0", "--lambda2", "0")

# Features under masks predict SAM's vectors (models/methods/dense.py), as in configs/alice_dense_small.yaml.
DENSE = ("--lambda4", "30", "--dense_variant", "distil")

# It trains with SGD, so that a learning rate of AdamW would hardly move it.
SIMSIAM = ("--lr", "0.025", "--min_lr", "1e-6")

# Three bases must fit side by side into a body, so that a base is half as wide as the crops of other arms.
GRID = PairingOptions(grid_bases=(3, 3), grid_crops=4)
VOCO = {
    "flags": (
        *words(grid_bases=GRID.grid_bases, grid_crops=GRID.grid_crops, a_min=-125, a_max=225),
        *("--lr", "1e-3", "--min_lr", "1e-5"),
    ),
    **{"method": "voco", "config": "voco_small.yaml", "crop_parts": (1, 2, 2), "grid": GRID},
}

ARMS: dict[str, Arm] = {
    SCRATCH: Arm("from scratch"),
    SCRATCH_OWN: Arm("from scratch, --scratch_flags"),
    "mim": Arm("masked image modelling", "random", MIM),
    "random": Arm("Alice, random pairs", "random", ALICE),
    "iou": Arm("Alice, IoU pairs", "iou", ALICE),
    "sam": Arm("Alice, SAM pairs", "sam", ALICE, "sam"),
    "sam_no_casa": Arm("Alice, SAM pairs, no CASA", "sam", ("--lambda1", "0.1", "--lambda2", "0"), "sam"),
    "true": Arm("Alice, true pairs", "sam", ALICE, "true"),
    "simsiam_iou": Arm("SimSiam, IoU pairs", "iou", SIMSIAM, method="simsiam", config="simsiam_small.yaml"),
    "dino_iou": Arm("DINO, IoU pairs", "iou", method="dino", config="dino_small.yaml"),
    "voco": Arm("VoCo", "grid", **VOCO),
    "voco_sam": Arm("VoCo, SAM pairs", "grid_sam", table="sam", **VOCO),
    "caid": Arm("CAiD", "iou", ("--lr", "1e-3", "--min_lr", "1e-5"), method="caid", config="caid_small.yaml"),
    "dense": Arm("masked image modelling, dense anatomy", "random", (*MIM, *DENSE), reads_vectors=True),
    "alice": Arm("Alice with dense anatomy, SAM pairs", "sam", (*ALICE, *DENSE), "sam", reads_vectors=True),
    "alice_random": Arm("Alice with dense anatomy, random pairs", "random", (*ALICE, *DENSE), reads_vectors=True),
}

# What a preset compares unless --arms says otherwise.
USUAL_ARMS = tuple(arm for arm in ARMS if not ARMS[arm].reads_vectors)
ANATOMY_ARMS = (SCRATCH, "mim", "random", "sam", "true", "dense", "alice", "alice_random")

# (better, worse): what the method claims, each tested at every number of labelled cases.
CLAIMS = (
    *((name, scratch) for scratch in UNTRAINED for name in ARMS if name not in UNTRAINED),
    *(("sam", other) for other in ("random", "iou", "mim", "sam_no_casa", "simsiam_iou", "dino_iou", "voco", "caid")),
    ("voco_sam", "voco"),
    ("true", "sam"),
    ("true", "random"),
    ("dense", "mim"),
    *(("alice", other) for other in ("mim", "sam", "dense", "alice_random")),
)
