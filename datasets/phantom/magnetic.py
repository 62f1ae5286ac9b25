"""Phantom MR: the patients of phantom CT with T1- or T2-weighted contrast, or with both in one file.

A tissue's signal is that of a spin echo, density * (1 - exp(-TR / T1)) * exp(-TE / T2), with relaxation times at 1.5 T:
liver, spleen, kidney, pancreas, muscle, fat and marrow of de Bazelaire et al., Radiology 2004;230:652; blood and heart
of Stanisz et al., Magn Reson Med 2005;54:507; the rest are rounded guesses. Blood that flows is dark. A patient's times
and densities vary by a twentieth, TR and TE within `SEQUENCES`. Air, cortical bone and metal have no signal.

A volume has a smooth bias field, an arbitrary scale (MR has no unit) and Rician noise, which is the magnitude of a
complex signal with Gaussian noise (Gudbjartsson and Patz, Magn Reson Med 1995). The phantom's anatomy is drawn as for
CT, so labels and landmarks are as exact. What the painters draw with fixed HU (stool, ascites, lesions) keeps one grey
in both contrasts: these phantoms test software, they are no model of pathology.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from datasets.phantom.cases import PhantomCase, RenderedCase, render
from datasets.phantom.patient import TISSUE_HU, Patient
from datasets.phantom.scan import Scan
from datasets.phantom.variants import Artefacts, Shares

# Tissue -> density of protons relative to water, T1 and T2 in ms.
RELAXATION = {
    "liver": (0.8, 586, 46),
    "spleen": (0.85, 1057, 79),
    "renal_cortex": (0.85, 966, 87),
    "renal_medulla": (0.9, 1412, 85),
    "pancreas": (0.8, 584, 46),
    "adrenal": (0.8, 850, 60),
    "myocardium": (0.8, 1030, 40),
    "esophagus": (0.8, 900, 40),
    "stomach_wall": (0.8, 900, 45),
    "bowel_wall": (0.8, 900, 45),
    "muscle": (0.8, 856, 27),
    "bile": (0.95, 2500, 500),
    "urine": (1.0, 3500, 900),
    "gut_fluid": (0.9, 2000, 250),
    "fat": (0.9, 343, 58),
    "lung": (0.15, 1200, 40),
}
MARROW = (0.6, 549, 49)
BLOOD = (0.2, 1441, 290)  # the density that is left where it flows
VARIATION = 0.05  # standard deviation of a patient's times and densities, relative
# Weighting -> ranges of TR and TE in ms.
SEQUENCES = {"t1": ((400, 650), (8, 15)), "t2": ((3000, 5000), (75, 110))}
AIR, SPAN = -1000.0, 1400.0  # the painters draw a signal s as AIR + SPAN * s, so that their air has none
MOST_DRAWN = 400.0  # cortical bone and metal are drawn above
BIAS = 0.35  # largest logarithm of the bias field
SCALES = (200.0, 6000.0)  # of a signal of 1, in the file
NOISE = (0.004, 0.015)  # standard deviation of a channel of the complex signal, of a signal of 1
MR_STREAM = 2  # the random numbers of MR are a patient's own stream


@dataclass(frozen=True)
class MRCase(PhantomCase):
    """What defines a phantom MR; the same values make the same files, byte for byte.

    Args:
        weightings: of each channel, keys of SEQUENCES.
    """

    weightings: tuple[str, ...] = ("t1",)

    @property
    def modality(self) -> str:
        return "mr " + " ".join(self.weightings)

    def stream(self, channel: int) -> np.random.Generator:
        """Random numbers of a channel; those of channel -1 are the patient's."""
        return np.random.Generator(np.random.PCG64([self.seed, int(self.labelled), self.index, MR_STREAM, channel + 1]))

    def sample(self) -> tuple[Patient, Scan, np.random.Generator]:
        """The patient and a scan without table, circle, noise and the artefacts of CT."""
        patient, scan, rng = super().sample()
        plain = {"noise_hu": 0.0, "table_mm": None, "circle": False, "artefacts": Artefacts(), "breathing": None}
        storage = "int16" if self.stream(-1).uniform() < 0.7 else "float32"
        return replace(patient, phase="native"), replace(scan, **plain, storage=storage), rng


@dataclass(frozen=True)
class _Channel(MRCase):
    """One channel of a case: its patient is drawn with the signals of one sequence."""

    def sample(self) -> tuple[Patient, Scan, np.random.Generator]:
        patient, scan, rng = super().sample()
        signals = tissue_signals(self.stream(-1), *SEQUENCES[self.weightings[0]])
        drawn = {tissue: AIR + SPAN * signal for tissue, signal in signals.items()}
        marrow = drawn.pop("marrow")
        return replace(patient, hu=drawn, bone_hu=marrow), scan, rng


def list_mr(
    num_unlabelled: int,
    num_labelled: int,
    seed: int,
    full_size: bool = False,
    shares: Shares | None = None,
    num_channels: int = 1,
) -> list[MRCase]:
    """The MR of a data set, of one channel (T1- or T2-weighted) or of two (both); sets can be extended."""
    return [
        MRCase(name, seed, k, labelled, full_size, shares=shares or Shares(), weightings=weightings)
        for labelled, num in ((False, num_unlabelled), (True, num_labelled))
        for k in range(1, num + 1)
        for name in [f"FLARE22_Tr_{k:04d}" if labelled else f"Case_{k:05d}"]
        for weightings in [tuple(SEQUENCES) if num_channels == 2 else (list(SEQUENCES)[(k + 1) % 2],)]
    ]


def tissue_signals(
    rng: np.random.Generator, repetition_ms: tuple[float, float], echo_ms: tuple[float, float]
) -> dict[str, float]:
    """Signal of every tissue of a patient, and of "marrow", for TR and TE drawn from two ranges."""
    signals = {}
    kinds = {tissue: RELAXATION.get(tissue, BLOOD) for tissue in TISSUE_HU} | {"marrow": MARROW}
    factors = {tissue: np.clip(rng.normal(1, VARIATION, 3), 0.7, 1.3) for tissue in kinds}
    repetition, echo = rng.uniform(*repetition_ms), rng.uniform(*echo_ms)
    for tissue, properties in kinds.items():
        density, t1, t2 = np.array(properties) * factors[tissue]
        signals[tissue] = float(density * (1 - np.exp(-repetition / t1)) * np.exp(-echo / t2))
    return signals


def render_mr(case: MRCase) -> RenderedCase:
    """Draw a case; its `hu` are intensities, float32 [X, Y, Z], or [X, Y, Z, C] of several channels."""
    plain = {name: getattr(case, name) for name in PhantomCase.__dataclass_fields__}
    channels = []
    for number, weighting in enumerate(case.weightings):
        drawn = render(_Channel(**plain, weightings=(weighting,)))
        signal = np.where(drawn.hu > MOST_DRAWN, 0, np.clip((drawn.hu - AIR) / SPAN, 0, None))
        channels.append(measured(signal.astype(np.float32), case.stream(number)))
    return replace(drawn, hu=channels[0] if len(channels) == 1 else np.stack(channels, axis=-1))


def measured(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A signal [X, Y, Z] with bias field, Rician noise and scale."""
    scale = np.exp(rng.uniform(*np.log(SCALES)))
    sigma = rng.uniform(*NOISE)
    real, imaginary = (sigma * rng.standard_normal(signal.shape, dtype=np.float32) for _ in range(2))
    return (scale * np.hypot(signal * bias_field(signal.shape, rng) + real, imaginary)).astype(np.float32)


def bias_field(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """The exponential of a random polynomial of second degree, whose absolute value reaches BIAS: float32 `shape`."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in shape), indexing="ij", sparse=True)
    terms = (x, y, z, x * x, y * y, z * z, x * y, y * z, x * z)
    logarithm = sum(np.float32(weight) * term for weight, term in zip(rng.normal(size=len(terms)), terms))
    logarithm = logarithm - logarithm.mean()
    return np.exp(np.float32(BIAS) * logarithm / np.abs(logarithm).max())
