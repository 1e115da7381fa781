"""Attention: decode over pages, groups that share a prompt, pieces of prompts, and training's packed sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels
from kernels import AttentionKind
from kernels.bench.case import Bar, Case, Op, Tensors, random, with_gradient
from kernels.reference.attention import CAUSAL, KV_BLOCK, score_scale
from kernels.reference.kv_store import quantise
from kernels.torch_attention import Spans, varlen_attention

HEADS, KV_HEADS = 32, 8
BY_ITSELF = "each by itself"
NEVER_SLOWER = Bar(0.98, 1.0, BY_ITSELF)  # within noise


def attend(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind = CAUSAL) -> Tensor:
    """Plain causal attention of the last queries of one sequence: q [T, Hq, D], k and v [K, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * score_scale(kind, q.shape[2])
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    at = torch.arange(k.shape[1] - q.shape[0], k.shape[1], device=q.device)[:, None]
    key = torch.arange(k.shape[1], device=q.device)
    hidden = key > at if kind.window is None else (key > at) | (key <= at - kind.window)
    return (torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v).transpose(0, 1)


def pages_of(batch: int, length: int) -> Tensor:
    """[batch, blocks] of sequences whose pages lie in no order."""
    blocks = length // KV_BLOCK
    return torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0)).view(batch, blocks)


def first_sequence(new: int, pages: Tensor) -> Op:
    """The truth for the first sequence of a batch that brings ``new`` tokens each."""

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = pages[0].to(q.device)
        k, v = (x[own].transpose(1, 2).flatten(0, 1) for x in (k, v))
        return attend(q[:new], k, v)

    return truth


def paged_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """New tokens over pages: one a sequence, or a piece of a prompt. The peer has its keys in one piece."""
    on_gpu = device.type == "cuda"
    dim = 128 if on_gpu else 64
    # sequences, tokens each, of which new
    sizes = ((32, 8192, 1), (128, 4096, 1), (1, 65536, 1), (4, 8192, 2048))
    for batch, context, new in sizes if on_gpu else ((8, 1024, 1), (1, 4096, 1), (2, 1024, 256)):
        pages = pages_of(batch, context)

        def make(seed: int, batch: int = batch, new: int = new, count: int = pages.numel()) -> Tensors:
            shape = (count, KV_HEADS, KV_BLOCK, dim)
            return random(seed, device, dtype, (batch * new, HEADS, dim), shape, shape)

        plan = kernels.plan_tiles([new] * batch, [context] * batch, pages.numpy(), device)
        fresh, whole = Spans.of([new] * batch, device), Spans.of([context] * batch, device)

        def ours(q: Tensor, k: Tensor, v: Tensor, plan: kernels.AttentionPlan = plan) -> Tensor:
            return kernels.attend_blocks(q, k, v, plan)

        def library(q: Tensor, k: Tensor, v: Tensor, fresh: Spans = fresh, whole: Spans = whole) -> Tensor:
            flat = k.view(-1, KV_HEADS, dim), v.view(-1, KV_HEADS, dim)
            return varlen_attention(q, *flat, fresh, whole, CAUSAL)

        seen = batch * new * (context - (new - 1) / 2)  # pairs of query and key
        yield Case(
            "paged_attention", f"{batch} x {new} of {context} tokens, {HEADS}/{KV_HEADS} heads of {dim}", make, ours,
            {}, first_sequence(new, pages), bytes=2.0 * batch * context * KV_HEADS * dim * dtype.itemsize,
            flops=4.0 * seen * HEADS * dim, rows=new, yardsticks={"torch varlen, contiguous": library},
            bar=None if new > 1 else Bar(0.80, 0.90) if batch >= 32 else Bar(0.70, 0.80),
        )  # fmt: skip


def quantised_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Decode over int8 and fp8 pages; the yardstick is the same over pages of the queries' dtype."""
    dim, (batch, context) = (128, (64, 8192)) if device.type == "cuda" else (64, (8, 1024))
    pages = pages_of(batch, context)
    plan = kernels.plan_tiles([1] * batch, [context] * batch, pages.numpy(), device)
    shape = (pages.numel(), KV_HEADS, KV_BLOCK, dim)
    for cached in (torch.int8, torch.float8_e4m3fn):

        def make(seed: int, cached: torch.dtype = cached) -> Tensors:
            q, *plain = random(seed, device, dtype, (batch, HEADS, dim), shape, shape)
            (k, k_scale), (v, v_scale) = (quantise(x, cached) for x in plain)
            return q, *plain, k, v, k_scale, v_scale

        def ours(q: Tensor, _k: Tensor, _v: Tensor, k: Tensor, v: Tensor, *scales: Tensor) -> Tensor:
            return kernels.attend_blocks(q, k, v, plan, scales=(scales[0], scales[1]))

        def truth(q: Tensor, _k: Tensor, _v: Tensor, k: Tensor, v: Tensor, *scales: Tensor) -> Tensor:
            k, v = (x.double() * scale[..., None] for x, scale in zip((k, v), scales, strict=True))
            return first_sequence(1, pages)(q, k, v)

        kept = str(cached).removeprefix("torch.")
        yield Case(
            "paged_attention", f"{batch} x 1 of {context} tokens kept as {kept}, heads of {dim}", make, ours, {}, truth,
            bytes=2.0 * batch * context * KV_HEADS * (dim + 4), rows=1,
            yardsticks={"not quantised": lambda q, k, v, *_: kernels.attend_blocks(q, k, v, plan)}, bar=Bar(0.80, 0.90),
        )  # fmt: skip


def cascade_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Samples of one prompt; the peer is our own decode on copies of the prompt's pages. Bytes count them once."""
    on_gpu = device.type == "cuda"
    dim, (groups, samples) = (128, (16, 16)) if on_gpu else (64, (2, 4))
    for prompt, answer in ((2048, 512), (192, 512)) if on_gpu else ((512, 128), (192, 128)):
        shared, own, rows = prompt // KV_BLOCK, answer // KV_BLOCK, groups * samples
        first = (torch.arange(groups)[:, None, None] * shared + torch.arange(shared)).expand(-1, samples, -1)
        rest = groups * shared + torch.arange(rows * own).view(groups, samples, own)
        tables = torch.cat([first, rest], -1).view(rows, -1)
        copies = groups * shared + rows * own + torch.arange(rows * shared).view(rows, shared)
        apart = torch.cat([copies, rest.view(rows, -1)], -1)
        num_blocks = groups * shared + rows * (own + shared)
        lengths = [prompt + answer] * rows
        together, separate = (kernels.plan_tiles([1] * rows, lengths, t.numpy(), device) for t in (tables, apart))

        def make(
            seed: int, count: int = num_blocks, first: Tensor = first, copies: Tensor = copies, rows: int = rows
        ) -> Tensors:
            q, k, v = random(seed, device, dtype, (rows, HEADS, dim), *[(count, KV_HEADS, KV_BLOCK, dim)] * 2)
            for cache in (k, v):
                cache[copies.flatten().to(device)] = cache[first.flatten().to(device)]
            return q, k, v

        def over(plan: kernels.AttentionPlan) -> Op:
            return lambda q, k, v: kernels.attend_blocks(q, k, v, plan)

        alone, once = rows * (prompt + answer), groups * prompt + rows * answer  # keys read
        yield Case(
            "cascade", f"{groups} prompts of {prompt} x {samples} answers of {answer}, heads of {dim}", make,
            over(together), {BY_ITSELF: over(separate)}, first_sequence(1, tables),
            bytes=2.0 * once * KV_HEADS * dim * dtype.itemsize, rows=1,
            bar=Bar(0.90, 0.95, BY_ITSELF, unit=alone / once) if prompt >= 256 else NEVER_SLOWER,
        )  # fmt: skip


def packed_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Whole sequences of equal length, forward and backward; then with a window and a soft cap."""
    on_gpu = device.type == "cuda"
    dim, length, count = (128, 8192, 2) if on_gpu else (64, 512, 2)
    lengths, tokens = [length] * count, count * length
    spans, slots = Spans.of(lengths, device), torch.arange(tokens, device=device)
    tables = (slots[::KV_BLOCK] // KV_BLOCK).view(count, -1).cpu().numpy()
    shapes = (tokens, HEADS, dim), *[(tokens, KV_HEADS, dim)] * 2

    def make(seed: int) -> Tensors:
        return random(seed, device, dtype, *shapes)

    def ours(kind: AttentionKind) -> Op:
        plan = kernels.plan_tiles(lengths, lengths, tables, device, kind.window)
        return lambda q, k, v: kernels.packed_attention(q, k, v, slots, tokens // KV_BLOCK, plan, kind)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, spans, spans, CAUSAL)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # by cuDNN or FlashAttention, as torch chooses
        q, k, v = (x.view(count, length, -1, dim).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v)

    peers: dict[str, Op] = {"torch varlen": varlen, "SDPA": sdpa}
    if on_gpu:
        peers |= {"cuDNN": cudnn, "FlexAttention": flex(CAUSAL, count, length, device)}
    # Causal: half of the products count. The backward's five products are 2.5 times the forward's two.
    work = 0.5 * 4.0 * count * length * length * HEADS * dim
    label = f"{count} x {length} tokens, {HEADS}/{KV_HEADS} heads of {dim}, causal"
    yield Case(
        "packed_attention", label, make, ours(CAUSAL), peers, attend, flops=work, cut=(0, 1, 2),
        bar=Bar(0.75, 0.90, "cuDNN"),
    )  # fmt: skip
    yield Case(
        "packed_attention", label, with_gradient(make, shapes[0], (0, 1, 2)), ours(CAUSAL), peers, attend,
        "backward", flops=2.5 * work, cut=(0, 1, 2, 3), bar=Bar(0.60, 0.75, "cuDNN"),
    )  # fmt: skip

    kind = AttentionKind(window=length // 8, softcap=50.0)
    pairs = count * sum(min(i + 1, length // 8) for i in range(length))
    yield Case(
        "packed_attention", f"{label}, window {kind.window}, soft cap 50", make, ours(kind),
        {"FlexAttention": flex(kind, count, length, device)} if on_gpu else {}, lambda q, k, v: attend(q, k, v, kind),
        flops=4.0 * pairs * HEADS * dim, cut=(0, 1, 2),
    )  # fmt: skip


def flex(kind: AttentionKind, count: int, length: int, device: torch.device, compile: bool = True) -> Op:
    """FlexAttention on ``count`` sequences of one length, compiled for this kind."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = key <= query
        return causal if kind.window is None else causal & (key > query - kind.window)

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if kind.softcap is None else kind.softcap * torch.tanh(score / kind.softcap)

    mask = create_block_mask(seen, None, None, length, length, device=device)
    run = torch.compile(flex_attention) if compile else flex_attention

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = score_scale(kind, q.shape[2])
        q, k, v = (x.view(count, length, -1, x.shape[2]).transpose(1, 2) for x in (q, k, v))
        out = run(q, k, v, score_mod=capped, block_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attended
