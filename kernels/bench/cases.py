"""What is measured: for each op its inputs, our call, the peers' calls, a float64 truth, and the work that must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One line of the table. ``ours`` and the peers take the tensors that ``make(seed)`` gives, and return one tensor.

    ``truth`` takes the same tensors in float64, those numbered in ``cut`` shortened to their first ``rows`` rows, and
    gives the first ``rows`` rows of the result. ``flops`` and ``bytes`` are what any implementation must spend.
    """

    op: str
    name: str
    make: Callable[[int], Tensors]
    ours: Callable[..., Tensor]
    peers: dict[str, Callable[..., Tensor]]
    truth: Callable[..., Tensor]
    flops: float = 0.0
    bytes: float = 0.0
    cut: tuple[int, ...] = ()
    rows: int = 64
    peers_agree: bool = True  # False: they answer a question of their own, and have no error


def random(
    seed: int, device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...], grad: bool = False
) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_(grad) for shape in shapes
    )


def backward_of(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Forward and backward of ``op``; the last tensor is the gradient that arrives. Returns the first input's."""

    def run(*tensors: Tensor) -> Tensor:
        *inputs, dout = tensors
        return torch.autograd.grad(op(*inputs), [t for t in inputs if t.requires_grad], dout)[0]

    return run


def norm_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows, width = (16384, 4096) if device.type == "cuda" else (512, 1024)
    size = rows * width * dtype.itemsize

    def naive(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.rms_norm(x, weight, 1e-6)

    def library(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, 1e-6)

    shapes = (rows, width), (width,)
    label, peers = f"{rows} x {width}", {"torch": library, **compiled(naive, device)}
    yield Case(
        "rms_norm", label, lambda s: random(s, device, dtype, *shapes), ours, peers, naive, bytes=2 * size, cut=(0,),
    )  # fmt: skip

    def with_gradient(seed: int) -> Tensors:
        return (*random(seed, device, dtype, *shapes, grad=True), *random(seed + 1, device, dtype, shapes[0]))

    both = {name: backward_of(op) for name, op in peers.items()}
    yield Case(
        "rms_norm", f"{label}, forward + backward", with_gradient, backward_of(ours), both, backward_of(naive),
        bytes=5 * size, cut=(0, 2),
    )  # fmt: skip


def gated_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows, width = (8192, 14336) if device.type == "cuda" else (512, 1536)

    def naive(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def make(seed: int) -> Tensors:
        return random(seed, device, dtype, (rows, 2 * width))

    yield Case(
        "swiglu", f"{rows} x {width}", make, kernels.swiglu, {"torch": naive, **compiled(naive, device)}, naive,
        bytes=3 * rows * width * dtype.itemsize, cut=(0,),
    )  # fmt: skip

    def with_gradient(seed: int) -> Tensors:
        return (
            *random(seed, device, dtype, (rows, 2 * width), grad=True),
            *random(seed + 1, device, dtype, (rows, width)),
        )

    peers = {name: backward_of(op) for name, op in {"torch": naive, **compiled(naive, device)}.items()}
    yield Case(
        "swiglu", f"{rows} x {width}, forward + backward", with_gradient, backward_of(kernels.swiglu), peers,
        backward_of(naive), bytes=8 * rows * width * dtype.itemsize, cut=(0, 1),
    )  # fmt: skip


def rope_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    tokens, heads, dim = (16384, 32, 128) if device.type == "cuda" else (512, 8, 64)

    def make(seed: int) -> Tensors:
        (x,) = random(seed, device, dtype, (tokens, heads, dim))
        frequencies = 10000 ** -(torch.arange(0, dim, 2, device=device) / dim)
        return x, *kernels.rope_tables(torch.arange(tokens, device=device), frequencies)

    def naive(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.to(cos.dtype).chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    yield Case(
        "rope", f"{tokens} x {heads} heads of {dim}", make, kernels.rope, {"torch": naive, **compiled(naive, device)},
        naive, bytes=2 * tokens * heads * dim * dtype.itemsize, cut=(0, 1, 2),
    )  # fmt: skip


def sampling_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Log-probs of the drawn tokens: draws themselves depend on the generator. The truth scores our tokens."""
    rows, vocab = (128, 131072) if device.type == "cuda" else (64, 8192)

    def make(seed: int) -> Tensors:
        z, u = random(seed, device, torch.float32, (rows, vocab), (rows,))
        return 2 * z, torch.ones(rows, device=device), torch.sigmoid(u)

    def ours(z: Tensor, heat: Tensor, uniform: Tensor) -> Tensor:
        return kernels.sample_tokens(z, heat, uniform).logprobs

    def library(z: Tensor, heat: Tensor, uniform: Tensor) -> Tensor:
        logp = torch.log_softmax(z / heat[:, None], -1)
        return logp.gather(1, torch.multinomial(logp.exp(), 1))[:, 0]

    def truth(z: Tensor, heat: Tensor, uniform: Tensor) -> Tensor:
        tokens = kernels.sample_tokens(z.float(), heat.float(), uniform.float()).tokens
        return torch.log_softmax(z / heat[:, None], -1).gather(1, tokens[:, None])[:, 0]

    yield Case(
        "sampling", f"{rows} x {vocab}, no filters", make, ours, {"torch": library}, truth, bytes=4.0 * rows * vocab,
        cut=(0, 1, 2), peers_agree=False,
    )  # fmt: skip


def logprob_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows, hidden, vocab = (8192, 4096, 128256) if device.type == "cuda" else (256, 256, 8192)
    chunk = 2048  # rows of logits that the plain form holds: 1 GB at this vocabulary

    def make(seed: int, grad: bool = False) -> Tensors:
        h, w = random(seed, device, dtype, (rows, hidden), (vocab, hidden))
        targets = torch.randint(vocab, (rows,), device=device, generator=torch.Generator(device).manual_seed(seed))
        scaled = (w / math.sqrt(hidden)).detach()
        return h.requires_grad_(grad), scaled.requires_grad_(grad), targets, torch.ones(rows, device=device)

    def ours(h: Tensor, w: Tensor, targets: Tensor, heat: Tensor) -> Tensor:
        return kernels.token_logprobs(h, w, targets, heat, vocab)[0]

    def chunked(h: Tensor, w: Tensor, targets: Tensor, heat: Tensor) -> Tensor:
        parts = []
        for i in range(0, len(h), chunk):
            z = (h[i : i + chunk] @ w.T).to(torch.promote_types(h.dtype, torch.float32)) / heat[i : i + chunk, None]
            parts.append(torch.log_softmax(z, -1).gather(1, targets[i : i + chunk, None])[:, 0])
        return torch.cat(parts)

    work = 2.0 * rows * hidden * vocab
    label = f"{rows} rows, hidden {hidden}, vocabulary {vocab}"
    yield Case("token_logprobs", label, make, ours, {"chunked matmul": chunked}, chunked, flops=work, cut=(0, 2, 3))

    def with_gradient(seed: int) -> Tensors:
        return (*make(seed, grad=True), *random(seed + 1, device, torch.float32, (rows,)))

    yield Case(
        "token_logprobs", f"{label}, forward + backward", with_gradient, backward_of(ours),
        {"chunked matmul": backward_of(chunked)}, backward_of(chunked), flops=3 * work, cut=(0, 2, 3, 4),
    )  # fmt: skip


def matmul_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    width, depth = (8192, 8192) if device.type == "cuda" else (1024, 1024)
    for rows in (1, 16, 64, 256, width):

        def make(seed: int, rows: int = rows) -> Tensors:
            return random(seed, device, dtype, (rows, depth), (width, depth))

        yield Case(
            "invariant_linear", f"{rows} x {depth} x {width}", make, kernels.invariant_linear, {"library": F.linear},
            F.linear, flops=2.0 * rows * depth * width,
            bytes=dtype.itemsize * (rows * depth + width * depth + rows * width), cut=(0,),
        )  # fmt: skip


def compiled(op: Callable[..., Tensor], device: torch.device) -> dict[str, Any]:
    """The plain form through torch.compile, where that needs no C++ compiler."""
    return {"torch.compile": torch.compile(op)} if device.type == "cuda" else {}
