"""The arms: what is done to the weights before finetuning, each as the flags in which it differs from the others."""

from dataclasses import dataclass

SCRATCH = "scratch"


@dataclass(frozen=True)
class Arm:
    """One way to start finetuning.

    Attributes:
        title: for tables and the figure.
        flags: of main_ddp.py, besides what all arms share.
        table: whose table of pairs it reads: "sam", "true" or None.
    """

    title: str
    flags: tuple[str, ...] = ()
    table: str | None = None


ARMS: dict[str, Arm] = {
    SCRATCH: Arm("from scratch"),
    "mim": Arm("masked image modelling", ("--pairing", "random", "--lambda1", "0", "--lambda2", "0")),
    "random": Arm("Alice, random pairs", ("--pairing", "random")),
    "iou": Arm("Alice, IoU pairs", ("--pairing", "iou")),
    "sam": Arm("Alice, SAM pairs", ("--pairing", "sam"), "sam"),
    "sam_no_casa": Arm("Alice, SAM pairs, no CASA", ("--pairing", "sam", "--lambda2", "0"), "sam"),
    "true": Arm("Alice, true pairs", ("--pairing", "sam"), "true"),
}

# (better, worse): what the method claims, each tested at every number of labelled cases.
CLAIMS = (
    *((name, SCRATCH) for name in ARMS if name != SCRATCH),
    *(("sam", other) for other in ("random", "iou", "mim", "sam_no_casa")),
    ("true", "sam"),
    ("true", "random"),
)
