"""Phantom CT, the scanner: table, blur, metal streaks, noise, truncation and padding of a drawn volume.

Noise is white noise smoothed over some tenths of a millimetre, as a reconstruction kernel does, so that neighbouring
voxels of 2 to 3 mm are nearly independent and those of 0.8 mm are not. Its strength follows the rays: the variance of a
projection grows with exp(attenuation), and a voxel collects the noise of all rays through it. Two rays stand for all,
one along each axis of the slice, and the tube current is taken to follow the attenuation half way
(Gies et al., Med Phys 1999). Where the sideways rays of the shoulders dominate, noise runs in streaks along them.
"""

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d, label

from datasets.phantom.scan import Scan

PADDING_HU = -3024
WATER_PER_MM = 0.019  # attenuation of water at 70 keV
MODULATION = 0.5  # share of the attenuation that is left after the tube current was adapted to it
USUAL_ATTENUATION = 4.6  # of an average trunk, the mean of both axes
METAL_HU = 2500.0
STREAK_MM = 25.0
MAX_METAL_PIECES = 6


def scan_volume(hu: np.ndarray, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """What the scanner makes of HU [X, Y, Z]: the volume as it is stored, before rounding."""
    if scan.table_mm is not None:
        _add_table(hu, scan)
    in_slice = scan.blur_mm / scan.spacing_mm[0]
    hu = gaussian_filter(hu, (in_slice, in_slice, 0.3), truncate=2.5)
    noise = _noise(hu, scan, rng)  # first: the same noise with and without metal
    hu += _metal_streaks(hu, scan, rng)
    hu += noise
    if scan.artefacts.truncation:
        _brighten_edge(hu, scan)
    hu = np.clip(hu, -1024, 3071)
    if scan.circle:
        hu[scan.outside_circle] = PADDING_HU
    return hu


def _noise(hu: np.ndarray, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """Noise with the correlation of `noise_mm`; stronger behind thick and dense parts."""
    sigma = [scan.noise_mm / spacing for spacing in scan.spacing_mm]
    sigma[2] = 0.5 * sigma[2]  # slices are thicker than their noise is wide
    noise = gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), sigma, truncate=3)
    noise /= noise.std()
    per_mm = np.clip(hu * np.float32(WATER_PER_MM / 1000) + np.float32(WATER_PER_MM), 0, 3 * WATER_PER_MM)
    sideways = per_mm.sum(axis=0, keepdims=True) * scan.spacing_mm[0]  # [1, Y, Z]
    through = per_mm.sum(axis=1, keepdims=True) * scan.spacing_mm[1]  # [X, 1, Z]
    variance = 0.5 * (np.exp(MODULATION * sideways) + np.exp(MODULATION * through))
    strength = np.sqrt(variance / np.exp(MODULATION * USUAL_ATTENUATION))
    noise *= np.clip(strength, 0.35, 2.5)
    if scan.artefacts.shoulder_streaks:
        starved = np.clip(sideways - 1.5 * USUAL_ATTENUATION, 0, 3)
        white = rng.standard_normal(hu.shape, dtype=np.float32)
        white = gaussian_filter1d(white, STREAK_MM / scan.spacing_mm[0], axis=0, mode="wrap", truncate=3)
        noise += white * (starved * np.float32(0.8) / max(white.std(), 1e-6))
    return noise * np.float32(scan.noise_hu)


def _metal_streaks(hu: np.ndarray, scan: Scan, rng: np.random.Generator) -> np.ndarray | float:
    """Bright and dark rays from every piece of metal, and a dark band between two of one slice."""
    metal = hu > METAL_HU
    if not metal.any():
        return 0.0
    xs, ys, _ = scan.axes_mm
    streaks = np.zeros_like(hu)
    for z in np.flatnonzero(metal.any(axis=(0, 1))):
        pieces, number = label(metal[:, :, z])
        for piece in range(1, min(number, MAX_METAL_PIECES) + 1):
            inside = np.argwhere(pieces == piece)
            centre = inside.mean(axis=0)
            reach = np.sqrt(len(inside) * scan.spacing_mm[0] * scan.spacing_mm[1])
            dx = xs[:, None] - xs[0] - centre[0] * scan.spacing_mm[0]
            dy = ys[None] - ys[0] - centre[1] * scan.spacing_mm[1]
            angle, distance = np.arctan2(dy, dx), np.hypot(dx, dy)
            rays = sum(
                rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5, 8, 11, 16, 23, 30)
            )
            streaks[:, :, z] += (12.0 * reach * rays / (1 + distance / max(reach, 3.0))).astype(np.float32)
    return streaks


def _brighten_edge(hu: np.ndarray, scan: Scan) -> None:
    """The reconstruction of a body that sticks out of the field is too bright at the field's edge."""
    fx, fy = np.linspace(-1, 1, scan.shape[0])[:, None], np.linspace(-1, 1, scan.shape[1])[None]
    edge_mm = (1 - np.sqrt(fx**2 + fy**2)) * scan.shape[0] * scan.spacing_mm[0] / 2
    bright = 160 * np.exp(-np.clip(edge_mm, 0, None) / 9.0).astype(np.float32)
    hu += np.where(hu > -500, bright[..., None], 0)


def _add_table(hu: np.ndarray, scan: Scan) -> None:
    """A curved table top with a bright skin and a foam core, `table_mm` below the lowest point of the body."""
    xs, ys, _ = scan.axes_mm
    middle = scan.origin_mm[0] + 0.5 * scan.spacing_mm[0] * scan.shape[0]
    curved = (xs - middle) ** 2 / 900.0
    body = (hu > -300).any(axis=2)
    top = (ys[None] - curved[:, None])[body].min() - 2.0 - scan.table_mm + curved
    depth = (top[:, None] - ys[None]).astype(np.float32)
    width = np.float32(max(0.9 * scan.spacing_mm[1], 1.5))
    skin = np.exp(-((depth / width) ** 2)) + np.exp(-(((depth - 26) / width) ** 2))
    table = -1000 + 1050 * np.minimum(skin, 1) + 60 * ((depth > 0) & (depth < 26))
    wide = np.abs(xs - middle)[:, None] < 210
    np.maximum(hu, np.where(wide, table, -1000).astype(np.float32)[..., None], out=hu)
