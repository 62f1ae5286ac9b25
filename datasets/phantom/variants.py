"""Phantom CT, what differs in kind between patients and scans: absent, additional and unusual anatomy, and artefacts.

How often each occurs in patients who are scanned: cholecystectomy about 12 %, solitary kidney 0.1 to 3 %, horseshoe
kidney 0.2 % (drawn more often, so that a data set of tens shows it), accessory spleen 10 to 30 %, 11 or 13 pairs of
ribs 5 to 8 %, lumbosacral transitional vertebrae (counted here as 4 or 6 lumbar ones) 4 to 30 %, Riedel's lobe 3 to
14 %.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np

LIVER_SHAPES = ("usual", "long_left", "small_left", "riedel")
METAL = ("right_hip", "left_hip", "spine")


@dataclass(frozen=True)
class Shares:
    """Share of phantoms, 0 to 1, that show a variant of anatomy or an artefact; 0 = none does.

    Attributes:
        no_gallbladder: share without a gallbladder, with clips in its place
        one_kidney: share with one kidney only, which is larger
        horseshoe_kidney: share whose kidneys are joined in front of the aorta
        accessory_spleen: share with a small second spleen near the hilum
        unusual_liver: share with a long or small left lobe, or with Riedel's lobe
        unusual_ribs: share with 11 or 13 pairs of ribs
        unusual_lumbar: share with 4 or 6 lumbar vertebrae
        arms_down: share with arms beside the body; others have them above the head
        ascites: share with free fluid in the belly
        oral_contrast: share with contrast medium in stomach and small bowel
        colon_contrast: share with contrast medium in the colon
        metal: share with a hip prosthesis or screws in the spine, and streaks from them
        shoulder_streaks: share of chests with streaks between the shoulders
        breathing: share with steps between slabs of slices
        truncation: share whose body is wider than the field of view
    """

    no_gallbladder: float = 0.12
    one_kidney: float = 0.04
    horseshoe_kidney: float = 0.02
    accessory_spleen: float = 0.15
    unusual_liver: float = 0.3
    unusual_ribs: float = 0.08
    unusual_lumbar: float = 0.1
    arms_down: float = 0.15
    ascites: float = 0.08
    oral_contrast: float = 0.25
    colon_contrast: float = 0.12
    metal: float = 0.08
    shoulder_streaks: float = 0.6
    breathing: float = 0.1
    truncation: float = 0.1

    def __post_init__(self) -> None:
        wrong = {name: share for name, share in dataclasses.asdict(self).items() if not 0 <= share <= 1}
        if wrong:
            stated = ", ".join(f"--{name} {share:g}" for name, share in wrong.items())
            raise ValueError(f"shares of phantoms must lie in 0 to 1, got {stated}")

    @classmethod
    def none(cls) -> "Shares":
        """Usual anatomy and no artefact."""
        return cls(**dict.fromkeys((field.name for field in dataclasses.fields(cls)), 0.0))


@dataclass(frozen=True)
class Anatomy:
    """What one patient has.

    Attributes:
        kidney_sides: 1 for the right, -1 for the left one.
        accessory_spleen: atlas centre (mm) and radius (mm), or None.
        liver: one of LIVER_SHAPES; rib_pairs: 11 to 13; num_lumbar: 4 to 6.
        ascites: 0 (none) to 1; metal: one of METAL, or "".
    """

    has_gallbladder: bool = True
    kidney_sides: tuple[int, ...] = (1, -1)
    is_horseshoe: bool = False
    accessory_spleen: tuple[tuple[float, float, float], float] | None = None
    liver: str = "usual"
    rib_pairs: int = 12
    num_lumbar: int = 5
    arms_down: bool = False
    ascites: float = 0.0
    oral_contrast: bool = False
    colon_contrast: bool = False
    metal: str = ""


@dataclass(frozen=True)
class Artefacts:
    """What one scan shows beside noise; whether metal streaks, the patient decides."""

    shoulder_streaks: bool = False
    breathing: bool = False
    truncation: bool = False


def sample_variants(rng: np.random.Generator, shares: Shares) -> tuple[Anatomy, Artefacts]:
    """Draw a patient's anatomy and a scan's artefacts.

    Every variant takes its own two random numbers, so that changing one share changes nothing else.
    """
    drawn = {field.name: rng.uniform(size=2) for field in dataclasses.fields(Shares)}
    place = rng.normal(0, 1, 3)

    def has(name: str) -> bool:
        return bool(drawn[name][0] < getattr(shares, name))

    def pick(name: str, choices: tuple):
        return choices[int(drawn[name][1] * len(choices))]

    one_kidney = has("one_kidney")
    accessory = None
    if has("accessory_spleen"):
        centre = np.array([-66.0, 16, 140]) + place * [5, 5, 9]
        accessory = (tuple(centre.tolist()), 5.0 + 5.0 * float(drawn["accessory_spleen"][1]))
    anatomy = Anatomy(
        has_gallbladder=not has("no_gallbladder"),
        kidney_sides=pick("one_kidney", ((1,), (-1,))) if one_kidney else (1, -1),
        is_horseshoe=has("horseshoe_kidney") and not one_kidney,
        accessory_spleen=accessory,
        liver=pick("unusual_liver", LIVER_SHAPES[1:]) if has("unusual_liver") else LIVER_SHAPES[0],
        rib_pairs=pick("unusual_ribs", (11, 13)) if has("unusual_ribs") else 12,
        num_lumbar=pick("unusual_lumbar", (4, 6)) if has("unusual_lumbar") else 5,
        arms_down=has("arms_down"),
        ascites=0.25 + 0.75 * float(drawn["ascites"][1]) if has("ascites") else 0.0,
        oral_contrast=has("oral_contrast"),
        colon_contrast=has("colon_contrast"),
        metal=pick("metal", METAL) if has("metal") else "",
    )
    return anatomy, Artefacts(has("shoulder_streaks"), has("breathing"), has("truncation"))


def absent_landmarks(anatomy: Anatomy) -> set[str]:
    """Names of the atlas' landmarks that a patient does not have, or not in the usual sense."""
    absent = set()
    if not anatomy.has_gallbladder:
        absent.add("gallbladder_centre")
    for side, word in ((1, "right"), (-1, "left")):
        parts = ("kidney_lateral_cortex", "kidney_upper_pole", "kidney_lower_pole", "renal_artery_origin")
        if side not in anatomy.kidney_sides:
            absent |= {f"{word}_{part}" for part in parts}
        if anatomy.is_horseshoe:
            absent.add(f"{word}_kidney_lower_pole")
        if anatomy.rib_pairs < 12:
            absent.add(f"{word}_rib_12_front_end")
        if anatomy.num_lumbar < 5:
            absent.add(f"L5_{word}_transverse_tip")
        if anatomy.metal == f"{word}_hip":
            absent.add(f"{word}_femoral_head")
    if anatomy.liver == "small_left":
        absent.add("liver_left_lobe")
    if anatomy.num_lumbar != 5:
        absent.add("sacral_promontory")
    if anatomy.num_lumbar < 5:
        absent |= {"L5_body", "L5_spinous_tip"}
    return absent
