"""A line of the table: an op's inputs, our call, the peers' calls, a float64 truth, and the work that must be done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import Tensor

Tensors = tuple[Tensor, ...]
Op = Callable[..., Tensor]
LIMIT = "limit"


@dataclass(frozen=True)
class Bar:
    """What is asked of a case on a GPU: a share of what ``of`` reaches.

    ``of``: the machine's limit, or a peer by name, whose time over ours counts. ``unit``: the ratio that counts as 1,
    where the bytes alone would give another.
    """

    floor: float
    aim: float
    of: str = LIMIT
    unit: float = 1.0


@dataclass(frozen=True)
class Case:
    """One line of the table. ``ours`` and the peers take the tensors that ``make(seed)`` gives, and return one tensor.

    ``timed``: the op; or its ``backward`` alone, or ``both``, when the last tensor is the gradient that arrives.
    ``truth`` takes the same tensors in float64, those numbered in ``cut`` shortened to their first ``rows`` rows; what
    is compared are the first ``rows`` rows of the result, or of the first input's gradient. ``flops`` and ``bytes`` are
    what any implementation must spend. ``yardsticks`` are timed like peers, but answer a question of their own.
    ``shown`` makes what is compared of the inputs and what an op returned, where that isn't enough.
    """

    op: str
    name: str
    make: Callable[[int], Tensors]
    ours: Op
    peers: dict[str, Op]
    truth: Op
    timed: Literal["forward", "backward", "both"] = "forward"
    flops: float = 0.0
    bytes: float = 0.0
    cut: tuple[int, ...] = ()
    rows: int = 64
    yardsticks: dict[str, Op] = field(default_factory=dict)
    shown: Callable[[Tensors, Tensor], Tensor] = lambda inputs, out: out
    bar: Bar | None = None
    extra_bytes: float | None = None  # of memory, at most, beyond inputs and results

    @property
    def label(self) -> str:
        return self.name + {"forward": "", "backward": ", backward", "both": ", forward + backward"}[self.timed]

    def result(self, op: Op, inputs: Tensors) -> Tensors:
        """What ``op`` gives of the inputs: its output, or the gradients of all inputs that have one."""
        if self.timed == "forward":
            return (op(*inputs),)
        *given, dout = inputs
        return torch.autograd.grad(op(*given), [t for t in given if t.requires_grad], dout)

    def call(self, op: Op, inputs: Tensors) -> Callable[[], Any]:
        """What is timed."""
        if self.timed != "backward":
            return lambda: self.result(op, inputs)
        *given, dout = inputs
        out, leaves = op(*given), [t for t in given if t.requires_grad]
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def random(
    seed: int, device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...], grad: bool = False
) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(grad) for shape in shapes
    )


def with_gradient(make: Callable[[int], Tensors], shape: tuple[int, ...], learnt: tuple[int, ...]) -> Any:
    """``make`` for a backward: inputs numbered in ``learnt`` want a gradient, one of ``shape`` arrives."""

    def run(seed: int) -> Tensors:
        given = make(seed)
        dout = random(seed + 1000, given[0].device, given[0].dtype, shape)
        return (*(t.requires_grad_(i in learnt) for i, t in enumerate(given)), *dout)

    return run


def compiled(op: Callable[..., Any], device: torch.device) -> dict[str, Callable[..., Any]]:
    """The plain form through torch.compile, where that needs no C++ compiler."""
    if device.type != "cuda":
        return {}
    # A backward that is timed runs again and again over one forward, whose buffers it must leave alone.
    torch._functorch.config.donated_buffer = False
    return {"torch.compile": torch.compile(op)}
