"""A device that is not the CPU, on machines that have no other: what otherwise only a GPU would show.

Its tensors lie on "other:0" and are computed by PyTorch's CPU kernels, so that in fp32 a run on it equals a run on the
CPU up to rounding (fused kernels that the CPU alone has are taken apart). As on CUDA, an operator refuses tensors of
two devices, NumPy gets none of them, and autocast casts what the installed PyTorch's `autocast_mode.h` lists for GPUs
(more than it lists for CPUs).

    python -m tests.other_device RUNS.json

runs main() of modules: the file is [[module, [argument, ...]], ...], and `--device cuda` there means this device. What
would make a CUDA program wait for its device is counted in `WAITS`.
"""

import contextlib
import importlib
import json
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import library
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

# Part of PyTorch from 2.9 on.
SET_UP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
NAME = "other"
TAKES_BOTH = {"_to_copy", "copy_", "_copy_from"}
# An index may lie on the CPU where what it points into lies on a device; not the reverse.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
KEPT_LIBRARIES = []  # a library's kernels go when it does
WAITS: list[str] = []  # where the host waited for the device
# Operators whose result on the host, or whose size, depends on values.
READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}


class OtherTensor(torch.Tensor):
    """A tensor that says it lies on "other:0"; `held` is the CPU tensor with its values."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **layout)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, replacing: "OtherTensor"):
        """PyTorch's own setter would leave the old values, in the old order, to compute with."""
        torch.Tensor.data.__set__(self, replacing)
        self.held = replacing.held

    def tolist(self):
        note_wait("tolist")
        return self.held.tolist()

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents=None):
        return f"OtherTensor({self.held})"


class Factories(TorchDispatchMode):
    """Sees operators without any tensor, such as `torch.zeros(3, device="other")`."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


class DeviceModule:
    """What PyTorch asks `torch.other` for."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)  # random numbers are the CPU's
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


def compute(operator, args: tuple, kwargs: dict):
    """Any operator: refuse what CUDA would refuse, then compute on the CPU and wrap the results."""
    name = operator.overloadpacket.__name__
    tensors: list[torch.Tensor] = []
    held, held_kwargs = held_by(args, tensors), held_by(kwargs, tensors)
    refuse_two_devices(name, tensors)
    if is_waiting(name, tensors, args, kwargs):
        note_wait(name)
    if name == "_copy_from":
        held[1].copy_(held[0])
        return args[1]
    has_other = any(isinstance(tensor, OtherTensor) for tensor in tensors)
    is_other = has_other
    if kwargs.get("device") is not None:
        is_other = torch.device(kwargs["device"]).type == NAME
        held_kwargs["device"] = torch.device("cpu")
    run = in_fp32(operator) if name in ("convolution", "convolution_backward") else operator
    results = run(*held, **held_kwargs)
    if not is_other or name == "_local_scalar_dense":
        return results
    wrapped = mapped(lambda one: OtherTensor(one) if isinstance(one, torch.Tensor) else one, results)
    return return_and_correct_aliasing(operator, args, kwargs, wrapped) if has_other else wrapped


def refuse_two_devices(name: str, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError where CUDA would; numbers (tensors without axes) may come from the CPU."""
    if name in TAKES_BOTH:
        return
    looked_at = tensors
    if name in INDEXING and isinstance(tensors[0], OtherTensor):
        looked_at = tensors[:1] if name == "index" else [tensors[0], tensors[-1]]  # what is indexed, and new values
    on_cpu = [tensor for tensor in looked_at if not isinstance(tensor, OtherTensor) and tensor.ndim]
    if on_cpu and any(isinstance(tensor, OtherTensor) for tensor in looked_at):
        shapes = [f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors]
        raise RuntimeError(f"{name}: expected all tensors on one device, found {', '.join(shapes)}")


def is_waiting(name: str, tensors: list[torch.Tensor], args: tuple, kwargs: dict) -> bool:
    """Whether CUDA's operator would wait for the device: it reads values, or copies and is not told to go on."""
    are_other = [isinstance(tensor, OtherTensor) for tensor in tensors]
    if name in READING:
        return any(are_other)
    if name in INDEXING:
        return are_other[0] and any(tensor.dtype == torch.bool for tensor in leaves(args[1]) if tensor is not None)
    if name not in TAKES_BOTH or kwargs.get("non_blocking") or args[2:3] == (True,):
        return False
    goes_to_other = are_other[0]
    if name == "_to_copy" and kwargs.get("device") is not None:
        goes_to_other = torch.device(kwargs["device"]).type == NAME
    elif name != "_to_copy":
        return are_other[0] != are_other[1]
    return goes_to_other != are_other[0]


def note_wait(name: str) -> None:
    """Add who called the operator, in our code, to `WAITS`."""
    tests = Path(__file__).parent
    ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(f"{tests.parent}/")]
    ours = [frame for frame in ours if not frame.filename.startswith(f"{tests}/")]
    frame = ours[-1] if ours else traceback.extract_stack()[-3]
    WAITS.append(f"{name} in {Path(frame.filename).name}:{frame.lineno} {frame.name}")


def held_by(value, tensors: list[torch.Tensor]):
    """`value` with the CPU's tensors in place of ours; every tensor met on the way is added to `tensors`."""
    kind = type(value)
    if kind is OtherTensor:
        tensors.append(value)
        return value.held
    if kind in (tuple, list):
        return kind([held_by(part, tensors) for part in value])
    if kind is dict:
        return {name: held_by(part, tensors) for name, part in value.items()}
    if isinstance(value, torch.Tensor):
        tensors.append(value)
    return value


def mapped(change: Callable, value):
    """`value` with its leaves changed; operators' arguments nest in nothing but these, so pytrees would be slow."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {name: mapped(change, part) for name, part in value.items()}
    return change(value)


def leaves(*values) -> list:
    """What `mapped` would change."""
    found = []
    mapped(found.append, values)
    return found


def in_fp32(operator) -> Callable:
    """Without the CPU's slowness in fp16, or its fault in bf16 (LOG.md, "the NaN of bfloat16 on a CPU")."""

    def run(*args, **kwargs):
        dtype = args[0].dtype
        if dtype == torch.float32:
            return operator(*args, **kwargs)
        wide = mapped(lambda one: one.float() if isinstance(one, torch.Tensor) else one, args)
        return mapped(lambda one: one.to(dtype) if isinstance(one, torch.Tensor) else one, operator(*wide, **kwargs))

    return run


def register() -> None:
    """Make the device known to PyTorch; once in a process."""
    SET_UP(NAME, backend_module=DeviceModule())
    kernels = library.Library("aten", "IMPL")
    for name in ("empty_strided", "empty.memory_format", "copy_", "_copy_from"):
        operator = operator_named(*name.split("."))
        kernels.impl(name, lambda *args, _operator=operator, **kwargs: compute(_operator, args, kwargs), "PrivateUse1")
    others = library.Library("_", "IMPL")
    others.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
    for policy, names in autocast_lists().items():
        for name in names:
            operator = operator_named(*name)
            kernels.impl(".".join(name), autocast_kernel(operator, policy), "AutocastPrivateUse1")
    KEPT_LIBRARIES.extend([kernels, others])


def operator_named(name: str, overload: str = "default"):
    return getattr(getattr(torch.ops.aten, name), overload)


def autocast_lists() -> dict[str, list[tuple[str, ...]]]:
    """What autocast does with which operators on GPUs, read from the installed PyTorch's header."""
    header = (Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h").read_text()
    lists = {}
    for policy in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        body = re.search(rf"#define AT_FORALL_{policy}\(_\)((?:.*\\\n)*.*)", header).group(1)
        lists[policy] = [tuple(re.split(r",\s*", words)) for words in re.findall(r"_\(([^)]*)\)", body)]
    return lists


def autocast_kernel(operator, policy: str) -> Callable:
    """Cast the arguments as the policy says, then run the operator without autocast."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(key):
            dtype = torch.float32
            if policy == "LOWER_PRECISION_FP":
                dtype = torch.get_autocast_dtype(NAME)
            elif policy == "PROMOTE":
                found = {leaf.dtype for leaf in leaves(args) if is_castable(leaf)}
                dtype = torch.float32 if torch.float32 in found else torch.get_autocast_dtype(NAME)
            if policy != "FP32_SET_OPT_DTYPE" or kwargs.get("dtype") is None:
                args, kwargs = mapped(lambda leaf: leaf.to(dtype) if is_castable(leaf) else leaf, (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


def is_castable(leaf: object) -> bool:
    is_ours = isinstance(leaf, torch.Tensor) and leaf.device.type == NAME
    return is_ours and leaf.is_floating_point() and leaf.dtype != torch.float64


def main(path: str) -> None:
    """Run the modules of a file of runs, in order."""
    take_for_cuda()
    for module, words in json.loads(Path(path).read_text()):
        print(f"== {module} {' '.join(words)}", flush=True)
        is_ours = "--device=cuda" in words or "cuda" in words
        with Factories() if is_ours else contextlib.nullcontext():
            importlib.import_module(module).main(words)


def take_for_cuda() -> None:
    """From now on `--device cuda` is this device."""
    import engine.device as device_module
    import engine.distributed as distributed

    register()
    device_module.make_cpu_repeatable()
    plain = device_module.pick_device

    def pick_device(wanted: str, local_rank: int) -> torch.device:
        return torch.device(NAME, 0) if wanted == "cuda" else plain(wanted, local_rank)

    device_module.pick_device = distributed.pick_device = pick_device


if __name__ == "__main__":
    main(sys.argv[1])
