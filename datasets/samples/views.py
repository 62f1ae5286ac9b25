"""Views of crops: drawn where crops are cut, made where they are needed.

A loading process cuts int16 HU and draws what every view will be, a few numbers each: at 96^3 voxels 2 MB a crop
instead of 21 MB a pair, and a fraction of the work. The voxels of views are made from it on the training device. They
are the same wherever that is, up to rounding, and however many processes load.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from datasets.samples.augment import AugmentOptions, Draws, ViewAugmenter, window
from datasets.samples.distort import DistortOptions, ViewDistorter
from datasets.samples.move import ViewMover

PICTURED_KINDS = ("augmented", "moved", "distorted")  # in the order in which they take seeds
Window = tuple[float, float]


class ViewMaker:
    """Draws and makes the views that a method asks for.

    Args:
        kinds: name of a view -> "augmented", "moved" or "distorted"; other kinds are left to others.
        roi: the crop (D, H, W) in voxels.
        hu_window: the HU that become 0 and 1.
        augment: strengths and probabilities of intensities.
        distort: for distorted views.
    """

    def __init__(
        self,
        kinds: Mapping[str, str],
        roi: Sequence[int],
        hu_window: Window,
        augment: AugmentOptions,
        distort: DistortOptions | None = None,
    ) -> None:
        self.hu_window = hu_window
        self.names = {kind: [name for name, made_as in kinds.items() if made_as == kind] for kind in PICTURED_KINDS}
        augmenter = ViewAugmenter(augment, *hu_window)
        self.makers: dict[str, ViewAugmenter | ViewDistorter] = {"augmented": augmenter}
        if self.names["moved"]:
            self.makers["moved"] = ViewAugmenter(augment, *hu_window, ViewMover(roi))
        if self.names["distorted"]:
            self.makers["distorted"] = ViewDistorter(augmenter, roi, distort)

    def draw(self, seeds: np.random.SeedSequence, own_windows: Sequence[Window | None]) -> dict[str, Draws | Tensor]:
        """What the views of a sample's V crops will be.

        Args:
            seeds: of the sample; children are spawned from it.
            own_windows: of each crop, for radiographs and MR; None = CT.

        Returns:
            "window": float64 [V, 2], of the plain crops; for each view its draws, stacked over the crops.
        """
        drawn: dict[str, Draws | Tensor] = {
            "window": torch.tensor([own or self.hu_window for own in own_windows], dtype=torch.float64)
        }
        # Seeds go to augmented pictures crop by crop, then to moved ones, and view by view to distorted ones; other
        # orders would change every recorded run.
        found: dict[str, list[Draws]] = {name: [] for names in self.names.values() for name in names}
        for kind in ("augmented", "moved"):
            for own in own_windows if self.names[kind] else ():
                for name, seed in zip(self.names[kind], seeds.spawn(len(self.names[kind]))):
                    found[name].append(self.makers[kind].draw(seed, own))
        for name in self.names["distorted"]:
            for own, seed in zip(own_windows, seeds.spawn(len(own_windows))):
                found[name].append(self.makers["distorted"].draw(seed, own))
        for name, draws in found.items():
            drawn[name] = {part: torch.stack([one[part] for one in draws]) for part in draws[0]}
        return drawn

    def make(self, hu: Tensor, drawn: Mapping[str, Draws | Tensor]) -> dict[str, Tensor]:
        """Crops and views of a batch, on the device of its crops.

        Args:
            hu: int16 [B, V, D, H, W].
            drawn: as from `draw`, collated over the batch; on the CPU.

        Returns:
            "crop": float32 [B, V, 1, D, H, W] in [0, 1], windowed alone; the same for each view, and of a distorted
            view also NAME_target.
        """
        batch, rows = hu.shape[:2], hu.flatten(0, 1)
        windows = drawn["window"].flatten(0, 1).tolist()
        made = {"crop": [window(row, *ends) for row, ends in zip(rows, windows)]}
        for kind, names in self.names.items():
            for name in names:
                draws = {part: values.flatten(0, 1) for part, values in drawn[name].items()}
                views = [
                    self.makers[kind].make(row, {part: values[index] for part, values in draws.items()})
                    for index, row in enumerate(rows)
                ]
                if kind == "distorted":
                    made[name], made[f"{name}_target"] = zip(*views)
                else:
                    made[name] = views
        return {name: torch.stack(tuple(views)).unflatten(0, batch) for name, views in made.items()}
