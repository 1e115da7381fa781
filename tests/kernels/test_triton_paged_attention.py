"""The paged attention kernels against float64 and plain torch: decode, splits, pieces of prompts, windows, pages."""

from __future__ import annotations

import dataclasses
import mmap
import re

import pytest
import torch
from accuracy import assert_close_to_truth
from paged import Batch, make_batch, truth
from torch import Tensor

from kernels import AttentionKind, plan_tiles, reference
from kernels.dispatch import warn_once
from kernels.triton import attend_blocks, attend_paged
from kernels.triton.attention_work import SPLIT, check_plan

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {
    "scale": AttentionKind(scale=0.7),
    "softcap": AttentionKind(softcap=1.5),  # scores reach 4
    "small softcap": AttentionKind(scale=0.05, softcap=50.0),
    "window 1": AttentionKind(window=1),
    "window 32": AttentionKind(window=32),
    "window 33": AttentionKind(window=33),
    "window 600": AttentionKind(window=600),
    "all": AttentionKind(scale=0.4, softcap=2.0, window=45),
}
CAUSAL = AttentionKind()


def attend(batch: Batch, kind: AttentionKind = CAUSAL, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    lse = torch.empty((*batch.q.shape[:2], 1), dtype=torch.float32, device=batch.q.device)
    plan = batch.plan(kind.window, exact=exact)
    return attend_blocks(batch.q, batch.k_cache, batch.v_cache, plan, kind, lse), lse


def check(batch: Batch, kind: AttentionKind = CAUSAL, *, exact: bool = False) -> None:
    out, lse = attend(batch, kind, exact=exact)
    wanted, sums = truth(batch, kind)
    plain = None
    if batch.q.dtype != torch.float32:
        plain = reference.attend_blocks(batch.q, *batch.finite(), batch.plan(kind.window), kind)
    assert out.dtype == batch.q.dtype
    assert_close_to_truth(out, wanted, plain)
    # The sum's error is that of its scores, which are of order 1; products of narrow floats are exact in fp32.
    assert (lse.double() - sums).abs().max() <= 2e-6 * sums.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (8, 1), (6, 2)])
def test_a_mixed_batch(heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Single tokens, a few, and pieces of prompts longer than any tile, with and without what came before."""
    queries, contexts = [1, 17, 1, 3, 130 // heads[0], 1], [1, 17, 33, 40, 150, 65]
    check(make_batch(queries, contexts, heads=heads, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [None, "all", "window 600"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_real_sizes(dim: int, name: str | None, dtype: torch.dtype, device: torch.device) -> None:
    queries, contexts = [1] * 6 + [3, 700, 1500], [5, 500, 1000, 2000, 4000, 8000, 3000, 1700, 1500]
    batch = make_batch(queries, contexts, heads=(16, 4), dim=dim, dtype=dtype, device=device)
    check(batch, KINDS[name] if name else CAUSAL)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_at_the_borders_of_pages_and_steps(length: int, dtype: torch.dtype, device: torch.device) -> None:
    check(make_batch([1, length], [length, length], dtype=dtype, device=device))


@pytest.mark.parametrize("length", [SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT + 33])
def test_lengths_at_the_borders_of_splits(length: int, device: torch.device) -> None:
    """The second sequence brings two tokens, the first of which may see nothing of the last split."""
    check(make_batch([1, 2, 1], [length, length, 5], heads=(2, 1), dim=16, device=device))


def test_more_parts_than_are_merged_at_a_time(device: torch.device) -> None:
    batch = make_batch([1], [17 * SPLIT + 5], heads=(1, 1), dim=16, device=device)
    batch.keys[0][-5:] = 3 * batch.q  # the largest scores come last
    batch.k_cache[batch.tables[0][-1], :, :5] = 3 * batch.q
    check(batch)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_softcap_and_window(name: str, dtype: torch.dtype, device: torch.device) -> None:
    length = SPLIT + 190 if name == "window 600" else 130
    check(make_batch([1, 1, 40], [length, 33, 100], dtype=dtype, device=device), KINDS[name])


@pytest.mark.parametrize("page", [16, 32, 96, 256])
@pytest.mark.parametrize("dim", [16, 20, 96])
def test_page_sizes_and_head_dims(page: int, dim: int, device: torch.device) -> None:
    check(make_batch([1, 30], [page + 1, 2 * page - 1], page=page, dim=dim, device=device))


@pytest.mark.parametrize("heads", [(16, 1), (17, 1), (71, 1)])
def test_many_query_heads_a_kv_head(heads: tuple[int, int], device: torch.device) -> None:
    """A tile is as high as one token's heads need."""
    batch = make_batch([1, 3], [40, 70], heads=heads, dim=16, dtype=torch.bfloat16, device=device)
    check(batch)
    check(batch, exact=True)


def test_large_scores_keep_the_softmax(device: torch.device) -> None:
    batch = make_batch([1, 20], [100, 90], device=device)
    batch.q.mul_(100)
    out, _ = attend(batch)
    wanted, _ = truth(batch, CAUSAL)
    assert (out.double() - wanted).abs().max() < 1e-4


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Pages 2^30 elements apart: page 3 lies beyond 2^31. Memory that is never touched is never there."""
    if device.type != "cpu":
        pytest.skip("a GPU's memory is there as soon as it is asked for")
    batch = make_batch([1, 20], [33, 50], dim=16, device=device)
    apart, (pages, heads, page, dim) = 1 << 30, batch.k_cache.shape
    far = []
    for cache in (batch.k_cache, batch.v_cache):
        memory = torch.frombuffer(mmap.mmap(-1, 4 * ((pages - 1) * apart + heads * page * dim)), dtype=torch.float32)
        far.append(memory.as_strided(cache.shape, (apart, *cache.stride()[1:])))
        for i in range(pages):
            far[-1][i] = cache[i]
    assert max(max(table) for table in batch.tables) * apart > 1 << 31
    found = attend(dataclasses.replace(batch, k_cache=far[0], v_cache=far[1]))
    for a, b in zip(found, attend(batch), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_company_nor_on_the_run(dtype: torch.dtype, device: torch.device) -> None:
    batch = make_batch([1, 18, 1, 1], [SPLIT + 40, 60, 33, 1], heads=(4, 1), dim=16, dtype=dtype, device=device)
    outs = attend(batch)[0].split(list(batch.queries))
    for i in range(len(batch.queries)):
        assert torch.equal(attend(batch.alone(i))[0], outs[i]), i
    few = batch.alone(3)
    for _ in range(20):
        assert torch.equal(attend(few)[0], outs[3])


def test_one_wrong_block_id_changes_the_result(device: torch.device) -> None:
    batch = make_batch([1, 5], [SPLIT + 20, 40], heads=(2, 1), dim=16, device=device)
    outs = attend(batch)[0].split([1, 5])
    for i, table in enumerate(batch.tables):
        for entry in (0, len(table) - 1):
            tables = [list(other) for other in batch.tables]
            tables[i][entry] = batch.tables[1 - i][0]
            found = attend(dataclasses.replace(batch, tables=tables))[0].split([1, 5])
            assert [torch.equal(a, b) for a, b in zip(found, outs, strict=True)] == [i != 0, i != 1]


def test_attend_paged_stores_before_it_attends(device: torch.device) -> None:
    batch = make_batch([1, 1, 20], [33, 64, 50], device=device)
    lengths = list(zip(batch.contexts, batch.queries, strict=True))
    k, v = (torch.cat([x[i][c - n :] for i, (c, n) in enumerate(lengths)]) for x in (batch.keys, batch.values))
    slots = [batch.tables[i][at // 32] * 32 + at % 32 for i, (c, n) in enumerate(lengths) for at in range(c - n, c)]
    where = torch.tensor(slots, device=device)
    empty = [cache.clone() for cache in (batch.k_cache, batch.v_cache)]
    for cache in empty:
        cache[where // 32, :, where % 32] = torch.nan
    out = attend_paged(batch.q, k, v, *empty, where, batch.plan())
    assert torch.equal(out, attend(batch)[0])
    for stored, cache in zip(empty, (batch.k_cache, batch.v_cache), strict=True):
        assert torch.equal(stored.nan_to_num(7), cache.nan_to_num(7))


def test_queries_may_lie_apart_and_there_may_be_none(device: torch.device) -> None:
    batch = make_batch([1, 20], [33, 50], device=device)
    fused = torch.cat([batch.q, batch.q], 1)
    apart = dataclasses.replace(batch, q=fused[:, : batch.q.shape[1]])
    assert not apart.q.is_contiguous()
    assert torch.equal(attend(apart)[0], attend(batch)[0])
    none = dataclasses.replace(batch, q=batch.q[:0], queries=[0, 0])
    assert attend(none)[0].shape == (0, *batch.q.shape[1:])
    assert torch.equal(attend(dataclasses.replace(batch, q=batch.q[1:], queries=[0, 20]))[0], attend(batch)[0][1:])


@pytest.mark.parametrize("dtype, dim", [(torch.float64, 16), (torch.float32, 288)])
def test_what_has_no_tile_goes_to_plain_torch_with_a_word(
    dtype: torch.dtype, dim: int, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    batch = make_batch([1, 3], [33, 40], dim=dim, dtype=dtype, device=device)
    caches = batch.finite()
    for _ in range(2):
        out = attend_blocks(batch.q, *caches, batch.plan())
        assert torch.equal(out, reference.attend_blocks(batch.q, *caches, batch.plan()))
    assert [r.message.count(f"head dim {dim}") for r in caplog.records] == [1]


def test_bad_input_is_named(device: torch.device) -> None:
    batch = make_batch([1, 3], [33, 40], device=device)
    q, k, v, plan = batch.q, batch.k_cache, batch.v_cache, batch.plan()
    wrong = {
        "[4, 4, 16] with pages": (q[..., :16], k, v, plan),
        "heads a multiple of KV heads": (q[:, :3], k, v, plan),
        "pages of 24 tokens; 16, or a multiple of 32": (q, k[:, :, :24], v[:, :, :24], plan),
        "both the same": (q, k, v[:-1], plan),
        "the last stride 1": (q, *(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v)), plan),
        "torch.bfloat16 and torch.float32 pages without scales; torch.float32": (q, k.bfloat16(), v, plan),
        "q has 3 tokens; the plan's sequences bring 4": (q[:3], k, v, plan),
        "sequence 1 of the plan has 3 queries, 70 keys": (q, k, v, plan_tiles([1, 3], [33, 70], batch.tables)),
    }
    for message, (some_q, some_k, some_v, some_plan) in wrong.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            attend_blocks(some_q, some_k, some_v, some_plan)
    with pytest.raises(ValueError, match=re.escape("lse is torch.float64 [4, 4]")):
        attend_blocks(q, k, v, plan, lse=torch.zeros(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("page", [16, 64])
def test_a_block_that_there_is_not_is_found_on_request(page: int) -> None:
    batch = make_batch([1, 3], [33, 70], page=page)
    pages = len(batch.k_cache)
    check_plan(batch.plan(), pages, page)
    used = -(-batch.contexts[1] // min(page, 32))
    for wrong in (-1, pages * max(1, page // 32)):
        batch.tables[1][used - 1] = wrong
        with pytest.raises(ValueError, match=re.escape(f"plan.tables[1, {used - 1}] = {wrong}; {pages} pages")):
            check_plan(batch.plan(), pages, page)
    batch.tables[1][used - 1 :] = [0, -1]  # one more than its keys need
    check_plan(batch.plan(), pages, page)
