"""Attention: decode over pages, groups that share a prompt, and training's packed sequences."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels.bench.cases import Case, Tensors, backward_of, random
from kernels.reference.attention import KV_BLOCK
from kernels.torch_attention import Spans, varlen_attention

HEADS, KV_HEADS = 32, 8


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention of the last queries of one sequence: q [T, Hq, D], k and v [K, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    at = torch.arange(k.shape[1] - q.shape[0], k.shape[1], device=q.device)
    scores = scores.masked_fill(torch.arange(k.shape[1], device=q.device) > at[:, None], -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(0, 1)


def decode_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """One new token a sequence, pages in random order. The peer has its keys in one piece, as no engine has."""
    dim = 128 if device.type == "cuda" else 64
    for batch, context in ((32, 8192), (128, 4096), (1, 65536)) if device.type == "cuda" else ((8, 1024), (1, 4096)):
        blocks = context // KV_BLOCK

        def make(seed: int, batch: int = batch, blocks: int = blocks) -> Tensors:
            shape = (batch * blocks, KV_HEADS, KV_BLOCK, dim)
            return random(seed, device, dtype, (batch, HEADS, dim), shape, shape)

        order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0)).view(batch, blocks)
        plan = kernels.plan_tiles([1] * batch, [context] * batch, order.numpy(), device)
        one, whole = Spans.of([1] * batch, device), Spans.of([context] * batch, device)

        def ours(q: Tensor, k: Tensor, v: Tensor, plan: kernels.AttentionPlan = plan) -> Tensor:
            return kernels.attend_blocks(q, k, v, plan)

        def library(q: Tensor, k: Tensor, v: Tensor, one: Spans = one, whole: Spans = whole, dim: int = dim) -> Tensor:
            flat = k.view(-1, KV_HEADS, dim), v.view(-1, KV_HEADS, dim)
            return varlen_attention(q, *flat, one, whole, kernels.AttentionKind())

        def truth(q: Tensor, k: Tensor, v: Tensor, order: Tensor = order) -> Tensor:
            pages = order[0].to(q.device)
            return attend(q[:1], *(x[pages].transpose(1, 2).flatten(0, 1) for x in (k, v)))

        yield Case(
            "decode", f"batch {batch} x {context} tokens, {HEADS}/{KV_HEADS} heads of {dim}", make, ours,
            {"torch varlen, contiguous": library}, truth, bytes=2.0 * batch * context * KV_HEADS * dim * dtype.itemsize,
            rows=1, peers_agree=False,
        )  # fmt: skip


def cascade_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Samples of one prompt; the peer is our own decode on copies of the prompt's pages. Bytes count them once."""
    dim, (prompt, answer) = (128, (2048, 512)) if device.type == "cuda" else (64, (512, 128))
    shared, own = prompt // KV_BLOCK, answer // KV_BLOCK
    groups, samples = (16, 16) if device.type == "cuda" else (2, 4)
    rows = groups * samples
    first = torch.arange(groups)[:, None, None] * shared + torch.arange(shared)
    rest = groups * shared + torch.arange(rows * own).view(groups, samples, own)
    tables = torch.cat([first.expand(-1, samples, -1), rest], -1).view(rows, -1)
    copies = groups * shared + rows * own + torch.arange(rows * shared).view(rows, shared)
    apart = torch.cat([copies, rest.view(rows, -1)], -1)
    num_blocks = groups * shared + rows * (own + shared)
    lengths = [prompt + answer] * rows
    together, separate = (kernels.plan_tiles([1] * rows, lengths, t.numpy(), device) for t in (tables, apart))

    def make(seed: int) -> Tensors:
        q, k, v = random(seed, device, dtype, (rows, HEADS, dim), *[(num_blocks, KV_HEADS, KV_BLOCK, dim)] * 2)
        for cache in (k, v):
            cache[copies.flatten().to(device)] = cache[first.expand(-1, samples, -1).flatten().to(device)]
        return q, k, v

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pages = tables[0].to(q.device)
        return attend(q[:1], *(x[pages].transpose(1, 2).flatten(0, 1) for x in (k, v)))

    yield Case(
        "cascade", f"{groups} prompts of {prompt} x {samples} answers of {answer}, heads of {dim}", make,
        lambda q, k, v: kernels.attend_blocks(q, k, v, together),
        {"each by itself": lambda q, k, v: kernels.attend_blocks(q, k, v, separate)}, truth,
        bytes=2.0 * (groups * prompt + rows * answer) * KV_HEADS * dim * dtype.itemsize, rows=1,
    )  # fmt: skip


def packed_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    dim, length, count = (128, 8192, 2) if device.type == "cuda" else (64, 512, 2)
    lengths = [length] * count
    plan = kernels.plan_tiles(
        lengths, lengths, torch.arange(count * length // KV_BLOCK).view(count, -1).numpy(), device
    )
    slots = torch.arange(count * length, device=device)
    spans = Spans.of(lengths, device)
    shapes = (count * length, HEADS, dim), *[(count * length, KV_HEADS, dim)] * 2

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernels.packed_attention(q, k, v, slots, count * length // KV_BLOCK, plan)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, spans, spans, kernels.AttentionKind())

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # by cuDNN or FlashAttention, as torch chooses
        q, k, v = (x.view(count, length, -1, dim).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    # Causal: half of the products count. The backward's five products are 2.5 times the forward's two.
    work = 0.5 * 4.0 * count * length * length * HEADS * dim
    label = f"{count} x {length} tokens, {HEADS}/{KV_HEADS} heads of {dim}, causal"

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    peers = {"torch varlen": varlen, "SDPA": sdpa, **({"cuDNN": cudnn} if device.type == "cuda" else {})}
    yield Case(
        "packed_attention", label, lambda s: random(s, device, dtype, *shapes), ours, peers, attend, flops=work,
        cut=(0, 1, 2),
    )  # fmt: skip

    def with_gradient(seed: int) -> Tensors:
        return (*random(seed, device, dtype, *shapes, grad=True), *random(seed + 1, device, dtype, shapes[0]))

    yield Case(
        "packed_attention", f"{label}, forward + backward", with_gradient, backward_of(ours),
        {name: backward_of(op) for name, op in peers.items()}, backward_of(attend), flops=3.5 * work,
        cut=(0, 1, 2, 3),
    )  # fmt: skip
