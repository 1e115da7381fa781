"""A device beside the CPU on a machine without a GPU: what is forgotten there, or mixed up, fails as on a GPU.

Inside :func:`second_device`, ``torch.device("meta")`` has memory. Its tensors hold CPU tensors and compute what those
would, to the bit, but an op refuses to mix them with the CPU's, numpy doesn't read them, and what makes the host wait
for the device (``.item()``, ``.tolist()``, ``nonzero``, a blocking copy) is counted, and so is what is sent there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)  # between the two devices
WAITS = (
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.bincount.default, aten._unique2.default, aten.repeat_interleave.Tensor,
)  # fmt: skip


class Elsewhere(Tensor):
    """A tensor of the second device. To give it other ``.data`` is beyond it: cast a module before it moves here."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:  # Triton's interpreter reads and writes it
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of the second device outlived it")


class Visits(TorchDispatchMode):
    """What the host did with the second device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0  # for a result
        self.uploads = 0  # of a CPU's tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in inputs if isinstance(x, Elsewhere)]
        if func is aten.copy_.default:
            there = isinstance(args[0], Elsewhere)
        else:
            there = bool(here) if kwargs.get("device") is None else torch.device(kwargs["device"]) == DEVICE
        if not here and not there:
            return func(*args, **kwargs)
        strangers = [x for x in inputs if not isinstance(x, Elsewhere) and x.dim() > 0]
        if strangers and func not in COPIES:
            raise RuntimeError(f"{func}: a tensor {list(strangers[0].shape)} on the CPU among others on a device")
        sent = func in COPIES and there and bool(strangers)
        self.uploads += sent
        self.waits += (sent and not asynchronous(func, args, kwargs)) or (bool(here) and waits(func, args, there))
        held, options = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
        if "device" in options:
            options["device"] = torch.device("cpu")
        found = func(*held, **options)
        if not there:
            return args[0] if func is aten.copy_.default else found
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_moved, found))


def asynchronous(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a copy says that nobody need wait for it."""
    return bool(kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,)))


def waits(func: Any, args: Any, there: bool) -> bool:
    """Whether the host learns from an op what the device computed: numbers, or the size of a result."""
    if func in (aten.index.Tensor, aten.index_put_.default):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return func in WAITS or (func in COPIES and not there)


def _moved(x: Any) -> Any:
    return Elsewhere(x) if isinstance(x, Tensor) else x


class _FromNumbers(TorchFunctionMode):
    """``torch.tensor`` asks no dispatch mode: made on the CPU, and copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return func(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[Visits]:
    with Visits() as visits, _FromNumbers():
        yield visits
