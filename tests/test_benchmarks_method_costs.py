"""The cost of a step by method: every method is counted, and what must cost more does."""

from benchmarks import method_costs
from models.methods import METHODS


def test_every_method_is_counted_per_voxel():
    flags = method_costs.make_flags().parse_args(["--quick"])
    found = method_costs.run(flags)
    cost = {name: entry["gflop_per_million_voxels"] for name, entry in found["methods"].items()}
    assert {case.method for case in method_costs.CASES.values()} == set(METHODS)
    assert cost["simsiam"] < cost["dino"] < cost["caid"] < cost["masked image modelling"] < cost["alice"]
    text = method_costs.markdown(found)
    assert "160,000 volumes" in text and all(text.count(f"| {name} |") == 2 for name in cost)


def test_hours_follow_the_work():
    """One volume in one crop at 1 GFLOP a million voxels and 1 TFLOP/s: 0.885 ms."""
    words = ["--crops_per_volume=1", "--peak_tflops=2", "--utilisation=0.5"]
    flags = method_costs.make_flags().parse_args(words)
    assert abs(3600 * method_costs.gpu_hours(1.0, 1, flags) / 0.884736e-3 - 1) < 1e-9


def test_flops_of_the_unet_follow_the_voxels():
    """Convolutions cost the same for each voxel whatever the crop; heads are small."""
    case = method_costs.dataclasses.replace(method_costs.CASES["simsiam"], backbone="unet")
    per_voxel = []
    for side in (32, 64):
        method = case.make((side, 32, 32), 4, use_checkpoint=False, is_quick=True)
        per_voxel.append(method_costs.step_flops(method, case, (side, 32, 32)) / side)
    assert abs(per_voxel[1] / per_voxel[0] - 1) < 0.05
