"""A GPU that is not there: fake `cuda` tensors, whose values are computed on the processor beside them.

torch's FakeTensorMode raises where an operation mixes devices. Whatever makes the host wait for a GPU is noted with
its line and given its value, so that what follows is checked as well.
"""

import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention, sdpa_dense
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
READS = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}  # give the host a number
COPIES = {"aten::_to_copy", "aten::copy_"}
# their results, or what they write to, are as large as values say
SIZES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::bincount"}
BY_MASK = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def lacks() -> str | None:
    """Why this torch cannot pretend to have a GPU, if so."""
    if torch.backends.cuda.is_built():
        return None
    return f"torch {torch.__version__} is built without CUDA, so that tensors cannot even pretend to be there"


class FakeGpu(TorchDispatchMode):
    """While it is on, all that names the device `cuda` is on a GPU that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: Counter[tuple[str, str, str]] = Counter()  # what, the line of ours, the line that asks

    def __enter__(self) -> "FakeGpu":
        torch._C._set_only_lift_cpu_tensors(True)  # or `torch.tensor` would start the driver
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(one, FakeTensor) or _is_gpu(one) for one in leaves):
            return function(*args, **kwargs)  # the host's own affair
        if function.namespace == "prim":  # asks where a tensor is
            with self.fakes:
                return function(*args, **kwargs)
        if torch.is_inference_mode_enabled() and function._can_decompose():  # nobody has yet
            with self:
                return function.decompose(*args, **kwargs)
        name = function.name().partition(".")[0]
        if name in READS:
            self._note("reads a number")
            return function(*tree_map(_value_of, args), **tree_map(_value_of, kwargs))
        if name in COPIES and (other := _copied(args, kwargs)):
            waits = not (kwargs.get("non_blocking") or args[2:] == (True,))
            source = _tensors(args)[-1]
            if source.numel() and (
                other == "to the host" or (waits and source.dim())
            ):  # a number goes with its kernel
                self._note(f"copies {other}")
            found = function(*tree_map(_value_of, args), **tree_map(_value_of, kwargs))
            return args[0] if name == "aten::copy_" else found if other == "to the host" else self.put(found)
        depends = name in SIZES or (name in BY_MASK and any(_is_mask(one) for one in args[1]))
        if depends:
            self._note("asks where values are true")
        with torch.no_grad():
            found = function(*tree_map(_value_of, args), **tree_map(_value_of, kwargs))
        is_new = not any(isinstance(one, FakeTensor) for one in leaves)
        if is_new or name in SIZES or (depends and name == "aten::index"):
            return tree_map(self.put, found)
        with self.fakes:
            fakes = function(*args, **kwargs)
        for fake, value in zip(tree_leaves(fakes), tree_leaves(found), strict=True):
            if isinstance(fake, FakeTensor):
                fake.of_host = value
        return fakes

    def put(self, value: Any) -> Any:
        """What has a value, as if it were on the GPU."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        with self.fakes:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
        fake.of_host = value
        return fake

    def _note(self, what: str) -> None:
        """Count a wait at its line, and at the innermost line of ours above it."""
        frames = [frame for frame in traceback.extract_stack(sys._getframe(2)) if frame.name != "__torch_dispatch__"]
        frames = [frame for frame in frames if "/torch/" not in frame.filename]
        ours = [frame for frame in frames if str(ROOT / "src") in frame.filename]
        self.waits[what, _line(ours[-1]) if ours else "", _line(frames[-1])] += 1

    @contextmanager
    def present(self) -> Iterator["FakeGpu"]:
        """On, also for autocast and for whoever would ask the driver."""
        with (
            patch("torch.cuda._lazy_init", lambda: None),
            patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None),
            patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            patch("torch.cuda.is_bf16_supported", lambda *_: True),
            self,
        ):
            yield self
        torch._C._set_only_lift_cpu_tensors(False)


@flex_attention.py_impl(FakeGpu)
def _flex_attention(gpu: FakeGpu, *args: Any, **kwargs: Any) -> Any:
    """By plain operations; the kernel is for a GPU that is there."""
    with gpu:
        return sdpa_dense(*args, **kwargs)


def _value_of(one: Any) -> Any:
    if isinstance(one, FakeTensor):
        return one.of_host  # type: ignore[attr-defined]
    return torch.device("cpu") if _is_gpu(one) else one


def _is_gpu(one: Any) -> bool:
    return isinstance(one, torch.device) and one.type == "cuda"


def _tensors(args: Any) -> list[Tensor]:
    return [one for one in args if isinstance(one, Tensor)]


def _is_mask(one: Any) -> bool:
    return isinstance(one, FakeTensor) and one.dtype in (torch.bool, torch.uint8)


def _copied(args: Any, kwargs: Any) -> str | None:
    """Which way a copy goes between host and GPU, if it does."""
    to = args[0] if len(_tensors(args)) == 2 else kwargs.get("device")
    is_from, is_to = isinstance(_tensors(args)[-1], FakeTensor), isinstance(to, FakeTensor) or _is_gpu(to)
    if to is None or is_from == is_to:
        return None
    return "to the host" if is_from else "from the host"


def _line(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    parts = path.parts
    if "site-packages" in parts:
        path = Path(*parts[parts.index("site-packages") + 1 :])
    elif path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    return f"{path}:{frame.lineno}"
