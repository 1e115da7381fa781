"""Ops bound by memory: norms, gates, rotary positions, stores into pages, sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels import reference
from kernels.bench.case import Bar, Case, Op, Tensors, compiled, random, with_gradient
from kernels.reference.kv_store import dequantise

FORWARD, BACKWARD = Bar(0.85, 0.92), Bar(0.70, 0.80)
EPS = 1e-6
PAGE = kernels.KV_BLOCK  # tokens


def norm_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows, width = (16384, 4096) if device.type == "cuda" else (512, 1024)
    size = rows * width * dtype.itemsize

    def naive(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.rms_norm(x, weight, EPS)

    def library(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (width,), weight, EPS)

    def make(seed: int) -> Tensors:
        return random(seed, device, dtype, (rows, width), (width,))

    label, peers = f"{rows} x {width}", {"torch": library, **compiled(naive, device)}
    yield Case("rms_norm", label, make, ours, peers, naive, bytes=2 * size, cut=(0,), bar=FORWARD)
    yield Case(
        "rms_norm", label, with_gradient(make, (rows, width), (0, 1)), ours, peers, naive, "backward", bytes=3 * size,
        cut=(0, 2), bar=BACKWARD,
    )  # fmt: skip

    def both(seed: int) -> Tensors:
        return random(seed, device, dtype, (rows, width), (rows, width), (width,))

    def after_sum(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return naive(x + residual, weight)

    def with_sum(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return naive(total, weight), total

    def first(op: Callable[..., tuple[Tensor, Tensor]]) -> Op:
        return lambda *given: op(*given)[0]

    yield Case(
        "add_rms_norm", label, both, lambda x, residual, weight: kernels.add_rms_norm(x, residual, weight, EPS)[0],
        {"torch": lambda x, residual, weight: library(x + residual, weight),
         **{name: first(op) for name, op in compiled(with_sum, device).items()}}, after_sum,
        bytes=4 * size, cut=(0, 1), bar=FORWARD,
    )  # fmt: skip


def gated_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows, width = (8192, 14336) if device.type == "cuda" else (512, 1536)
    size = rows * width * dtype.itemsize

    def silu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def gelu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    def make(seed: int) -> Tensors:
        return random(seed, device, dtype, (rows, 2 * width))

    for name, ours, naive in (("swiglu", kernels.swiglu, silu), ("geglu", kernels.geglu, gelu)):
        label, peers = f"{rows} x {width}", {"torch": naive, **compiled(naive, device)}
        yield Case(name, label, make, ours, peers, naive, bytes=3 * size, cut=(0,), bar=FORWARD)
        yield Case(
            name, label, with_gradient(make, (rows, width), (0,)), ours, peers, naive, "backward", bytes=5 * size,
            cut=(0, 1), bar=BACKWARD,
        )  # fmt: skip


def rope_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Turning by itself, as training does it; and with the store into pages, as the engine does it."""
    tokens, heads, kv_heads, dim = (16384, 32, 8, 128) if device.type == "cuda" else (512, 8, 2, 64)
    size = tokens * heads * dim * dtype.itemsize

    def tables() -> Tensors:
        frequencies = 10000 ** -(torch.arange(0, dim, 2, device=device) / dim)
        return kernels.rope_tables(torch.arange(tokens, device=device), frequencies)

    def make(seed: int) -> Tensors:
        return (*random(seed, device, dtype, (tokens, heads, dim)), *tables())

    def naive(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.to(cos.dtype).chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    label, peers = f"{tokens} x {heads} heads of {dim}", {"torch": naive, **compiled(naive, device)}
    yield Case("rope", label, make, kernels.rope, peers, naive, bytes=2 * size, cut=(0, 1, 2), bar=FORWARD)
    yield Case(
        "rope", label, with_gradient(make, (tokens, heads, dim), (0,)), kernels.rope, peers, naive, "backward",
        bytes=2 * size, cut=(0, 1, 2, 3), bar=BACKWARD,
    )  # fmt: skip

    slots = shuffled(tokens, device)
    fresh, pages = (tokens, kv_heads, dim), (tokens // PAGE, kv_heads, PAGE, dim)

    def with_pages(seed: int) -> Tensors:
        q, k, v, k_cache = random(seed, device, dtype, (tokens, heads, dim), fresh, fresh, pages)
        return q, k, v, *tables(), k_cache, k_cache.clone()

    def stored(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return placed(naive(k, cos, sin), slots, k_cache)

    def by(store: Op) -> Op:
        return lambda *given: store(*given, slots)

    yield Case(
        "rope_store", f"{tokens} x {heads}/{kv_heads} heads of {dim}", with_pages,
        by(kernels.rope_store), {"torch": by(reference.rope_store)},
        stored, bytes=2 * size * (1 + 2 * kv_heads / heads), shown=lambda given, _: given[5], bar=FORWARD,
    )  # fmt: skip


def store_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Keys and values into pages: as they are, and quantised by token and head."""
    tokens, heads, dim = (65536, 8, 128) if device.type == "cuda" else (2048, 2, 64)
    slots = shuffled(tokens, device)
    new, pages = (tokens, heads, dim), (tokens // PAGE, heads, PAGE, dim)

    for cached in (dtype, torch.int8, torch.float8_e4m3fn):

        def make(seed: int, cached: torch.dtype = cached) -> Tensors:
            caches = [torch.zeros(pages, device=device).to(cached) for _ in range(2)]
            return *random(seed, device, dtype, new, new), *caches, *torch.zeros((2, *pages[:3]), device=device)

        def by(store: Callable[..., None], quantised: bool = cached != dtype) -> Op:
            def run(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *scales: Tensor) -> Tensor:
                store(k, v, k_cache, v_cache, slots, scales if quantised else None)
                return k_cache

            return run

        def shown(given: Tensors, k_cache: Tensor, quantised: bool = cached != dtype) -> Tensor:
            return dequantise(k_cache, given[4], torch.float32) if quantised else k_cache

        kept = str(cached).removeprefix("torch.")
        yield Case(
            "store_kv", f"{tokens} x {heads} heads of {dim}, kept as {kept}", make, by(kernels.store_kv),
            {"torch": by(reference.store_kv)}, lambda k, v, k_cache, *_: placed(k, slots, k_cache), shown=shown,
            bytes=2.0 * tokens * heads * (dim * (dtype.itemsize + cached.itemsize) + 4 * (cached != dtype)),
            bar=FORWARD,
        )  # fmt: skip


def shuffled(tokens: int, device: torch.device) -> Tensor:
    """Slots of as many tokens, in no order."""
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(device)


def placed(x: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
    """Rows x of tokens in pages like ``cache``."""
    out = torch.empty_like(cache, dtype=x.dtype)
    out[slots // PAGE, :, slots % PAGE] = x
    return out


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

    def scored(z: Tensor, heat: Tensor, uniform: Tensor, *filters: Tensor) -> Tensor:
        tokens = kernels.sample_tokens(z.float(), heat.float(), uniform.float(), *filters).tokens
        return torch.log_softmax(z / heat[:, None], -1).gather(1, tokens[:, None])[:, 0]

    label, read = f"{rows} x {vocab}", 4.0 * rows * vocab
    yield Case(
        "sampling", f"{label}, no filters", make, ours, {}, scored, bytes=read, cut=(0, 1, 2),
        yardsticks={"torch": library}, bar=Bar(0.70, 0.80),
    )  # fmt: skip

    top_k, top_p = torch.full((rows,), 50, device=device), torch.full((rows,), 0.95, device=device)

    def filtered(z: Tensor, heat: Tensor, uniform: Tensor) -> Tensor:
        return kernels.sample_tokens(z, heat, uniform, top_k[: len(z)], top_p[: len(z)]).logprobs

    def by_sorting(z: Tensor, heat: Tensor, uniform: Tensor) -> Tensor:
        logp = torch.log_softmax(z / heat[:, None], -1)
        ordered, tokens = logp.sort(-1, descending=True)
        p = ordered.exp()
        p[:, 50:] = 0
        p[p.cumsum(-1) - p > 0.95 * p.sum(-1, keepdim=True)] = 0
        return logp.gather(1, tokens.gather(1, torch.multinomial(p, 1)))[:, 0]

    yield Case(
        "sampling", f"{label}, top-k 50, top-p 0.95", make, filtered, {},
        lambda z, *rest: scored(z, *rest, top_k[: len(z)], top_p[: len(z)]), bytes=read, cut=(0, 1, 2),
        yardsticks={"torch, sorting": by_sorting},
    )  # fmt: skip
