"""The geometry of one view: a smooth, invertible map from the view's voxels to places in the volume.

The affine part stands for crop, scale, rotation and shear (Yan et al., "SAM", TMI 2022, Sec. III-A, crops and scales);
the bend for what differs between patients. Both directions are computed at single points, so that corresponding points
of two views are exact and no field has to be inverted.

Frames: *view index* (d, h, w) of a view's voxels; *volume mm* = voxel index times spacing of the source array, in the
same (d, h, w) order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INVERSE_STEPS = 24

Triple = tuple[int, int, int]


class Warp:
    """A smooth, invertible map from view index to volume mm: an affine part plus a trilinear control lattice.

    Args:
        shape: voxels of the view (D, H, W).
        spacing_mm: of the view's voxels before `matrix`, (D, H, W).
        centre_mm: [3] volume mm of the view's centre.
        matrix: [3, 3] applied to mm offsets from the centre.
        control_mm: [3, a, b, c] displacements (mm) at lattice nodes spread from the view's first to its last voxel;
            shrunk where needed so that the map stays invertible.
    """

    def __init__(
        self, shape: Triple, spacing_mm: tuple[float, ...], centre_mm: Tensor, matrix: Tensor, control_mm: Tensor
    ):
        self.shape = shape
        self.spacing = torch.tensor(spacing_mm, dtype=torch.float64)
        self.middle = (torch.tensor(shape, dtype=torch.float64) - 1) / 2
        self.centre = centre_mm.double()
        self.matrix = matrix.double()
        self.inverse = torch.linalg.inv(self.matrix)
        self.control = self._invertible(control_mm.double())

    def _invertible(self, control: Tensor, share: float = 0.6) -> Tensor:
        """Shrink the displacements until their steepest slope is `share` of the affine part's weakest stretch."""
        extent = 2 * self.middle * self.spacing
        slopes = []
        for axis in range(3):
            step = extent[axis] / (control.shape[axis + 1] - 1)
            slopes.append(control.diff(dim=axis + 1).norm(dim=0).max() / step)
        steepest = torch.stack(slopes).norm()
        limit = share * torch.linalg.svdvals(self.matrix).min()
        return control * torch.clamp(limit / steepest.clamp(min=1e-9), max=1.0)

    def _displacement(self, index: Tensor) -> Tensor:
        """Displacement (mm) at view indices [N, 3] -> [N, 3]; constant beyond the lattice."""
        unit = (index / self.middle - 1).flip(-1)  # grid_sample wants (w, h, d)
        sampled = F.grid_sample(
            self.control[None], unit.view(1, -1, 1, 1, 3), align_corners=True, padding_mode="border"
        )
        return sampled.view(3, -1).T  # [N, 3]

    def to_volume(self, index: Tensor) -> Tensor:
        """View indices [N, 3] -> volume mm [N, 3] (float64)."""
        index = index.double()
        offset = (index - self.middle) * self.spacing
        return self.centre + offset @ self.matrix.T + self._displacement(index)

    def to_view(self, point_mm: Tensor) -> Tensor:
        """Volume mm [N, 3] -> view indices [N, 3] (float64), by fixed-point iteration (a contraction, see `Warp`)."""
        target = point_mm.double() - self.centre
        index = (target @ self.inverse.T) / self.spacing + self.middle
        for _ in range(INVERSE_STEPS):
            index = ((target - self._displacement(index)) @ self.inverse.T) / self.spacing + self.middle
        return index

    def dense(self) -> Tensor:
        """Volume mm of every view voxel, float32 [D, H, W, 3]."""
        axes = [(torch.arange(n) - m) * s for n, m, s in zip(self.shape, self.middle, self.spacing)]
        columns = self.matrix.float()
        base = self.centre.float().view(1, 1, 1, 3)
        for axis, offsets in enumerate(axes):
            sizes = [1, 1, 1, 1]
            sizes[axis] = -1
            base = base + offsets.float().view(sizes) * columns[:, axis]
        bend = F.interpolate(self.control[None].float(), size=self.shape, mode="trilinear", align_corners=True)
        return base + bend[0].movedim(0, -1)
