"""Ops bound by matrix products: the batch-invariant linear layer, logits, log-probs of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.bench.case import Bar, Case, Tensors, random

CHUNK = 2048  # rows of logits that the plain form of the log-probs holds: 1 GB at a vocabulary of 128 k


def linear_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    width, depth = (8192, 8192) if device.type == "cuda" else (1024, 1024)
    for rows in (1, 16, 64, 256, width):

        def make(seed: int, rows: int = rows) -> Tensors:
            return random(seed, device, dtype, (rows, depth), (width, depth))

        yield Case(
            "invariant_linear", f"{rows} x {depth} x {width}", make, kernels.invariant_linear, {"library": F.linear},
            F.linear, flops=2.0 * rows * depth * width,
            bytes=dtype.itemsize * (rows * depth + width * depth + rows * width), cut=(0,),
            bar=Bar(0.6, 0.8, "library") if rows <= 256 else Bar(0.85, 0.95, "library"),
        )  # fmt: skip


def logit_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Of a decode step: what the sampler reads."""
    rows, hidden, vocab = (256, 4096, 128256) if device.type == "cuda" else (64, 256, 8192)

    def make(seed: int) -> Tensors:
        return head(seed, device, dtype, rows, hidden, vocab)[:2]

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return kernels.logits(h, w, vocab)

    def library(h: Tensor, w: Tensor) -> Tensor:
        return wide(h @ w.T)

    yield Case(
        "logits", f"{rows} rows, hidden {hidden}, vocabulary {vocab}", make, ours, {"matmul": library}, library,
        flops=2.0 * rows * hidden * vocab,
        bytes=dtype.itemsize * hidden * (rows + vocab) + 4.0 * rows * vocab, cut=(0,),
    )  # fmt: skip


def logprob_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows, hidden, vocab = (8192, 4096, 128256) if device.type == "cuda" else (256, 256, 8192)

    def make(seed: int) -> Tensors:
        return head(seed, device, dtype, rows, hidden, vocab)

    def ours(h: Tensor, w: Tensor, targets: Tensor, heat: Tensor) -> Tensor:
        return kernels.token_logprobs(h, w, targets, heat, vocab)[0]

    def plain(h: Tensor, w: Tensor, targets: Tensor, heat: Tensor) -> Tensor:
        z = wide(h @ w.T) / heat[:, None]
        return torch.log_softmax(z, -1).gather(1, targets[:, None])[:, 0]

    def chunked(h: Tensor, w: Tensor, targets: Tensor, heat: Tensor) -> Tensor:
        """The plain form by chunks of rows; its backward keeps all logits."""
        chunks = zip(*(x.split(CHUNK) for x in (h, targets, heat)), strict=True)
        return torch.cat([plain(a, w, b, c) for a, b, c in chunks])

    def recomputed(h: Tensor, w: Tensor, targets: Tensor, heat: Tensor) -> Tensor:
        """The same; its backward computes a chunk's logits once more, and so holds one chunk at a time, as ours."""
        chunks = zip(*(x.split(CHUNK) for x in (h, targets, heat)), strict=True)
        return torch.cat([checkpoint(plain, a, w, b, c, use_reentrant=False) for a, b, c in chunks])

    def product(h: Tensor, w: Tensor, targets: Tensor, heat: Tensor) -> Tensor:
        return h @ w.T

    work, alone = 2.0 * rows * hidden * vocab, "the product alone"
    label = f"{rows} rows, hidden {hidden}, vocabulary {vocab}"
    yield Case(
        "token_logprobs", label, make, ours, {"chunked matmul": chunked}, chunked, flops=work, cut=(0, 2, 3),
        yardsticks={alone: product}, bar=Bar(0.75, 0.85, alone),
    )  # fmt: skip

    def with_gradient(seed: int) -> Tensors:
        h, w, *rest = make(seed)
        dout = random(seed + 1000, device, torch.float32, (rows,))
        return h.requires_grad_(), w.requires_grad_(), *rest, *dout

    # The form to beat holds as little as ours; the one that keeps all logits, 4 GB and more, stands beside.
    yield Case(
        "token_logprobs", label, with_gradient, ours, {"chunked matmul": chunked, "chunked, recomputed": recomputed},
        chunked, "both", flops=3 * work, cut=(0, 2, 3, 4), bar=Bar(1 / 1.2, 1 / 1.1, "chunked, recomputed"),
        extra_bytes=1e9,
    )  # fmt: skip


def head(seed: int, device: torch.device, dtype: torch.dtype, rows: int, hidden: int, vocab: int) -> Tensors:
    """Hidden states, a head whose logits are of size 1, targets, temperatures of 1."""
    h, w = random(seed, device, dtype, (rows, hidden), (vocab, hidden))
    targets = torch.randint(vocab, (rows,), device=device, generator=torch.Generator(device).manual_seed(seed))
    return h, w / math.sqrt(hidden), targets, torch.ones(rows, device=device)


def wide(x: Tensor) -> Tensor:
    """In fp32, or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
