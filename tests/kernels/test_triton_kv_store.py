"""Keys and values into pages, as they are and quantised; attention over quantised pages within the error's bound."""

from __future__ import annotations

import mmap
import re

import pytest
import torch
from accuracy import assert_close_to_truth, normal
from paged import make_batch, truth
from torch import Tensor

from kernels import AttentionKind, cpu, reference
from kernels.dispatch import warn_once
from kernels.reference.kv_store import QUANTISED, dequantise, quantise
from kernels.triton import attend_blocks, attend_paged, store_kv
from kernels.triton.attention_work import SPLIT

pytestmark = pytest.mark.usefixtures("poisoned")
STORED = list(QUANTISED)


def pages(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Filled with a pattern, since int8 has no NaN."""
    return torch.full(shape, 7.0, device=device).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [None, *STORED])
@pytest.mark.parametrize("heads, dim, page", [(2, 16, 32), (3, 20, 96), (1, 64, 16)])
def test_pages_and_scales_are_those_of_the_reference(
    heads: int, dim: int, page: int, stored: torch.dtype | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Bit for bit, in the slots and everywhere else; k and v are slices of a fused projection."""
    fused = normal(9, 4 * heads, dim, dtype=dtype, device=device)
    fused[3] = 0  # a token of zeros has the scale 0
    k, v = fused[:, heads : 2 * heads], fused[:, 3 * heads :]
    slots = torch.randperm(3 * page, generator=torch.Generator().manual_seed(0))[:9].to(device)
    found, wanted = [], []
    for results, op in ((found, store_kv), (wanted, reference.store_kv)):
        caches = [pages((3, heads, page, dim), stored or dtype, device) for _ in range(2)]
        scales = tuple(pages((3, heads, page), torch.float32, device) for _ in range(2)) if stored else None
        op(k, v, *caches, slots, scales)
        results += [*caches, *(scales or ())]
    for a, b in zip(found, wanted, strict=True):
        assert same(a, b)


@pytest.mark.parametrize("stored", STORED)
def test_quantised_is_as_near_as_its_grid(stored: torch.dtype) -> None:
    """int8: half a step of amax / 127. e4m3 has 3 bits after the first: 1/16 of the number, or half its least step."""
    x = torch.cat([normal(50, 2, 64), 1e-6 * normal(50, 2, 64, seed=1), 1e6 * normal(50, 2, 64, seed=2)])
    values, scale = quantise(x, stored)
    assert values.float().abs().amax(-1).eq(QUANTISED[stored]).all()
    error = (values.double() * scale.double()[..., None] - x.double()).abs()
    step = scale.double()[..., None]
    bound = step / 2 if stored is torch.int8 else torch.maximum(x.double().abs() / 16, step / 1024)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > bound / 2).any()


def test_slots_beyond_32_bits(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a GPU's memory is there as soon as it is asked for")
    k, v = normal(2, 2, 16), normal(2, 2, 16, seed=1)
    caches = []
    for _ in range(2):
        memory = torch.frombuffer(mmap.mmap(-1, 4 * ((3 << 30) + 1024)), dtype=torch.float32)
        caches.append(memory.as_strided((4, 2, 32, 16), (1 << 30, 512, 16, 1)))
    store_kv(k, v, *caches, torch.tensor([3 * 32 + 5, 31]))
    for x, cache in zip((k, v), caches, strict=True):
        assert torch.equal(cache[3, :, 5], x[0]) and torch.equal(cache[0, :, 31], x[1])
        assert cache[3].count_nonzero() == cache[0].count_nonzero() == 32


def test_nothing_to_store_and_no_kernel(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    cache = torch.zeros(2, 2, 32, 16, dtype=torch.float64, device=device)
    x = torch.ones(1, 2, 16, dtype=torch.float64, device=device)
    store_kv(x, 2 * x, cache, other := torch.zeros_like(cache), torch.tensor([33], device=device))
    assert cache[1, :, 1].eq(1).all() and other[1, :, 1].eq(2).all() and cache.sum() == 32
    assert "store_kv of float64 runs in plain torch" in caplog.text
    none = x[:0].float()
    store_kv(none, none, cache.float(), cache.float(), torch.zeros(0, dtype=torch.int64, device=device))


def test_bad_input_is_named(device: torch.device) -> None:
    k = normal(3, 2, 16, device=device)
    cache, slots = torch.zeros(4, 2, 32, 16, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    eight, scale = cache.to(torch.int8), torch.zeros(4, 2, 32, device=device)
    wrong = {
        "v is torch.float32 [2, 2, 16]; as k": (k, k[:2], cache, cache, slots, None),
        "slots is torch.int32 [3]": (k, k, cache, cache, slots.int(), None),
        "slots is torch.int64 [2]": (k, k, cache, cache, slots[:2], None),
        "torch.int8 and torch.int8 pages without scales; torch.float32": (k, k, eight, eight, slots, None),
        "torch.float8_e4m3fn or torch.int8": (k, k, cache, cache, slots, (scale, scale)),
        "contiguous float32 [4, 2, 32]": (k, k, eight, eight, slots, (scale, scale[:2])),
    }
    for message, args in wrong.items():
        with pytest.raises(ValueError, match="store_kv: .*" + re.escape(message)):
            store_kv(*args)


# ---------------------------------------------------------------- attention over quantised pages


def quantised(cache: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    """What was never written is the worst that the type can say, and its scale NaN."""
    values, scale = quantise(cache.nan_to_num(), stored)
    unwritten = cache.isnan().any(-1)
    return values.float().masked_fill(unwritten[..., None], 127 if stored is torch.int8 else torch.nan).to(stored), (
        scale.masked_fill(unwritten, torch.nan)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("kind", [AttentionKind(), AttentionKind(scale=0.3, softcap=2.0, window=45)])
def test_attention_over_quantised_pages(
    kind: AttentionKind, stored: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    """Against float64 on the quantised numbers, as near as ever; against the unquantised, within what that may cost."""
    length = 130 if kind.window else SPLIT + 40
    batch = make_batch([1, 1, 20], [length, 33, 50], heads=(4, 1), dtype=dtype, device=device)
    caches, scales = zip(*(quantised(x, stored) for x in (batch.k_cache, batch.v_cache)), strict=True)
    plan = batch.plan(kind.window)
    out = attend_blocks(batch.q, *caches, plan, kind, scales=scales)

    finite = [x.float().nan_to_num(0).to(stored) for x in caches]
    zeroed = tuple(s.nan_to_num(0) for s in scales)
    rounded = [dequantise(x, s, torch.float64) for x, s in zip(finite, zeroed, strict=True)]
    originals = batch.keys[:], batch.values[:]
    for i, (context, table) in enumerate(zip(batch.contexts, batch.tables, strict=True)):
        for x, cache in zip((batch.keys, batch.values), rounded, strict=True):
            x[i] = torch.cat([cache[block].transpose(0, 1) for block in table])[:context]
    wanted, _ = truth(batch, kind)
    plain = reference.attend_blocks(batch.q, *finite, plan, kind, scales=zeroed)
    assert_close_to_truth(out, wanted, None if dtype == torch.float32 else plain)

    # |score| is off by at most e = scale |q| . |error of k|, its weight by a factor e^2e, and v by its own error.
    for (own_k, own_v), own_q, found, k, v in zip(
        zip(*originals, strict=True), batch.q.split(batch.queries), out.split(batch.queries), batch.keys, batch.values,
        strict=True,
    ):  # fmt: skip
        scale = kind.scale or batch.q.shape[2] ** -0.5
        off = scale * torch.einsum("thd,nd->thn", own_q.double().abs(), (k - own_k.double()).abs()[:, 0])
        weight = torch.expm1(2 * off.amax((1, 2)))
        size, step = own_v.double().abs().max(), (v - own_v.double()).abs().max()
        single = truth_of(own_q, own_k, own_v, kind, device)
        slack = 4 * torch.finfo(dtype).eps * size
        assert ((found.double() - single).abs().amax((1, 2)) <= weight * size + (1 + weight) * step + slack).all()


def truth_of(q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, device: torch.device) -> Tensor:
    one = make_batch([len(q)], [len(k)], heads=(q.shape[1], k.shape[1]), dim=q.shape[2], dtype=q.dtype, device=device)
    one.q.copy_(q)
    one.keys[0], one.values[0] = k, v
    return truth(one, kind)[0]


@pytest.mark.parametrize("ops", [reference, cpu])
@pytest.mark.parametrize("stored", STORED)
def test_attend_paged_quantises_what_it_stores(stored: torch.dtype, ops: object, device: torch.device) -> None:
    """Kernels, plain torch and what falls back to it do the same to pages, and nearly the same to outputs."""
    q, k, v = (normal(1, n, 32, seed=i, device=device) for i, n in enumerate((4, 2, 2)))
    batch = make_batch([1], [40], device=device)
    slot = torch.tensor([batch.tables[0][1] * 32 + 7], device=device)
    results = []
    for attend in (attend_paged, ops.attend_paged):
        caches = [pages(batch.k_cache.shape, stored, device) for _ in range(2)]
        scales = tuple(torch.full(batch.k_cache.shape[:3], 0.1, device=device) for _ in range(2))
        out = attend(q, k, v, *caches, slot, batch.plan(), AttentionKind(), scales)
        results.append((out, *caches, *scales))
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert same(a, b)
    assert (results[0][0] - results[1][0]).abs().max() <= 2e-6 * results[1][0].abs().max()
