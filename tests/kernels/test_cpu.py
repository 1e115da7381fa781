"""The C++ ops against float64 and against the reference, bit for bit against themselves in other company."""

from __future__ import annotations

import itertools
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu, plan_tiles, reference
from kernels.cpu import loader

pytestmark = pytest.mark.skipif(cpu.extension() is None, reason="no compiler, or a CPU the ops aren't written for")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)).item()


# ---------------------------------------------------------------- attention


class Sequences:
    """Sequences of random keys in shuffled pages, each with its last ``num_queries`` tokens asking."""

    def __init__(self, lengths: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, page: int, seed: int = 0):
        self.lengths, self.page = lengths, page
        self.keys = [normal(context, kv_heads, dim, seed=seed + i) for i, (_, context) in enumerate(lengths)]
        self.values = [normal(context, kv_heads, dim, seed=seed + 99 + i) for i, (_, context) in enumerate(lengths)]
        self.queries = [normal(count, heads, dim, seed=seed + 999 + i) for i, (count, _) in enumerate(lengths)]
        per_page = page // 32
        free = list(range(sum(-(-context // page) for _, context in lengths) + 2))
        random.Random(seed).shuffle(free)
        # What no sequence wrote is as bad as can be: it must not be read.
        self.k_cache = torch.full((len(free), kv_heads, page, dim), torch.nan)
        self.v_cache = torch.full_like(self.k_cache, torch.nan)
        self.tables = []
        for (_, context), k, v in zip(lengths, self.keys, self.values, strict=True):
            pages = [free.pop() for _ in range(-(-context // page))]
            slots = torch.tensor([pages[i // page] * page + i % page for i in range(context)], dtype=torch.int64)
            cpu.store_kv(k, v, self.k_cache, self.v_cache, slots)
            self.tables.append([p * per_page + i for p in pages for i in range(per_page)])

    def attend(self, scale: float, window: int = 0, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
        q = torch.cat(self.queries)
        out, lse = torch.full_like(q, torch.nan), torch.full((*q.shape[:2], 1), torch.nan)
        plan = plan_tiles(*zip(*self.lengths, strict=True), self.tables)
        where = plan.queries, plan.contexts, plan.tables
        torch.ops.onpolicy.attend(q, self.k_cache, self.v_cache, *where, scale, window, softcap, out, lse)
        return out, lse

    def truth(self, scale: float, window: int = 0, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
        outs, lses = [], []
        for (count, context), q, k, v in zip(self.lengths, self.queries, self.keys, self.values, strict=True):
            group = q.shape[1] // k.shape[1]
            k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            at, key = torch.arange(context - count, context)[:, None], torch.arange(context)
            hidden = (key > at) | ((key <= at - window) if window else torch.zeros(1, dtype=torch.bool))
            scores = scores.masked_fill(hidden, -torch.inf)
            outs.append(torch.einsum("hqk,khd->qhd", torch.softmax(scores, -1), v))
            lses.append(torch.logsumexp(scores, -1).T[..., None])
        return torch.cat(outs), torch.cat(lses)


LENGTHS = [(1, 1), (0, 40), (31, 31), (1, 32), (32, 32), (33, 33), (1, 33), (7, 130), (1, 200), (50, 97)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (8, 1)])
@pytest.mark.parametrize("dim", [20, 32, 64, 72])
@pytest.mark.parametrize("page", [32, 64])
def test_attention_is_softmax_over_the_visible_keys(heads: int, kv_heads: int, dim: int, page: int) -> None:
    batch = Sequences(LENGTHS, heads, kv_heads, dim, page)
    for actual, expected in zip(batch.attend(dim**-0.5), batch.truth(dim**-0.5), strict=True):
        assert error(actual, expected) < 2e-6


@pytest.mark.parametrize("window", [0, 1, 5, 32, 33, 100])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_windows_softcaps_and_scales_are_honoured(window: int, softcap: float) -> None:
    batch = Sequences(LENGTHS, 6, 2, 24, 32)
    for actual, expected in zip(batch.attend(0.37, window, softcap), batch.truth(0.37, window, softcap), strict=True):
        assert error(actual, expected) < 2e-6


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_row_of_attention_has_the_same_bits_in_any_chunk_page_and_company(data: st.DataObject) -> None:
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (4, 1), (6, 2), (5, 5)]))
    dim, window = data.draw(st.sampled_from([16, 20, 40])), data.draw(st.sampled_from([0, 3, 40]))
    softcap, length = data.draw(st.sampled_from([0.0, 2.0])), data.draw(st.integers(1, 150))
    whole = Sequences([(length, length)], heads, kv_heads, dim, 32)
    truth, truth_lse = whole.attend(0.3, window, softcap)
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=4))})
    for begin, end in itertools.pairwise(cuts):
        others = data.draw(st.lists(st.integers(1, 70).map(lambda n: (n, n)), max_size=3))
        place = data.draw(st.integers(0, len(others)))
        lengths = [*others[:place], (end - begin, end), *others[place:]]
        batch = Sequences(lengths, heads, kv_heads, dim, data.draw(st.sampled_from([32, 64])), seed=7)
        for i, table_page in enumerate(range(0, len(batch.tables[place]), batch.page // 32)):
            page = batch.tables[place][table_page] // (batch.page // 32)
            part = slice(i * batch.page, min((i + 1) * batch.page, end))
            batch.k_cache[page, :, : part.stop - part.start] = whole.keys[0][part].transpose(0, 1)
            batch.v_cache[page, :, : part.stop - part.start] = whole.values[0][part].transpose(0, 1)
        batch.queries[place] = whole.queries[0][begin:end]
        out, lse = batch.attend(0.3, window, softcap)
        row = sum(count for count, _ in lengths[:place])
        assert torch.equal(out[row : row + end - begin], truth[begin:end])
        assert torch.equal(lse[row : row + end - begin], truth_lse[begin:end])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int, set_threads: Callable[[int], None]) -> None:
    batch, x = Sequences([(90, 90), (1, 300), (64, 70)] * 4, 8, 2, 64, 32), normal(300, 1030)

    def run() -> list[Tensor]:
        return [*batch.attend(0.1), cpu.rms_norm(x, x[0], 1e-6), cpu.swiglu(x), *cpu.add_rms_norm(x, -x, x[0], 1e-6)]

    set_threads(1)
    alone = run()
    set_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(run(), alone, strict=True))


# ---------------------------------------------------------------- norms, rotation, MLP

ELEMENTWISE = {
    "rms_norm": lambda ops, x: [ops.rms_norm(x, normal(x.shape[1], seed=5), 1e-5)],
    "add_rms_norm": lambda ops, x: list(ops.add_rms_norm(x, x.flip(1), normal(x.shape[1], seed=5), 1e-5)),
    "rope": lambda ops, x: [ops.rope(x.view(len(x), 2, -1), *rotation(x, x.shape[1] // 4))],
    "swiglu": lambda ops, x: [ops.swiglu(x)],
    "geglu": lambda ops, x: [ops.geglu(x)],
}


def rotation(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    angle = x[:, :half].detach().float() * 3
    return torch.cos(angle), torch.sin(angle)


@pytest.mark.parametrize("width", [4, 12, 32, 100, 260])
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_elementwise_ops_and_their_gradients_are_those_of_the_reference_in_float64(op: str, width: int) -> None:
    x = normal(11, width) * 3
    ours, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    results = [ELEMENTWISE[op](cpu, ours), ELEMENTWISE[op](reference, truth)]
    upstream = [normal(*out.shape, seed=3) for out in results[0]]
    for actual, expected in zip(*results, strict=True):
        # the reference's statistics are fp32 whatever comes in
        assert error(actual, expected.double()) < 1e-6
    torch.autograd.backward(results[0], upstream)
    torch.autograd.backward(results[1], [up.to(out.dtype) for up, out in zip(upstream, results[1], strict=True)])
    assert ours.grad is not None and truth.grad is not None
    assert error(ours.grad, truth.grad) < 3e-6


@settings(max_examples=30, deadline=None)
@given(
    op=st.sampled_from(sorted(ELEMENTWISE)),
    width=st.sampled_from([4, 20, 64, 132]),
    rows=st.lists(st.integers(0, 39), min_size=1, max_size=40),
)
def test_a_row_of_an_elementwise_op_has_the_same_bits_in_any_company(op: str, width: int, rows: list[int]) -> None:
    x = normal(40, width)
    for part, whole in zip(ELEMENTWISE[op](cpu, x[rows]), ELEMENTWISE[op](cpu, x), strict=True):
        assert torch.equal(part, whole[rows])


def test_a_slice_of_fused_heads_needs_no_copy() -> None:
    fused = normal(9, 7, 16)
    q, _ = fused.split((5, 2), 1)
    cos, sin = rotation(fused[:, 0], 8)
    assert torch.equal(cpu.rms_norm(q, fused[0, 0], 1e-6), cpu.rms_norm(q.contiguous(), fused[0, 0], 1e-6))
    assert torch.equal(cpu.rope(q, cos, sin), cpu.rope(q.contiguous(), cos, sin))


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
@pytest.mark.parametrize("gate", [-200.0, -89.0, 0.0, 89.0, math.inf, -math.inf, math.nan])
def test_gates_at_the_ends_of_the_range(gate: float, op: str) -> None:
    x = torch.tensor([[gate, 1.0] * 8]).view(1, 8, 2).transpose(1, 2).reshape(1, 16)
    torch.testing.assert_close(getattr(cpu, op)(x), getattr(reference, op)(x), equal_nan=True)


# ---------------------------------------------------------------- sampling


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2, st.integers(0, 2**40)), min_size=1, max_size=9))
def test_philox_has_the_bits_of_the_reference(keys: list[tuple[int, int, int]]) -> None:
    columns = torch.tensor(keys).T
    assert torch.equal(cpu.philox_uniform(*columns), reference.philox_uniform(*columns))


@pytest.mark.parametrize("vocab", [3, 255, 256, 257, 1000, 5000])
def test_drawn_tokens_are_where_the_cdf_in_float64_says(vocab: int) -> None:
    z, heat = normal(64, vocab) * 3, torch.full((64,), 0.8)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1))
    found = cpu.sample_tokens(z, heat, uniform)
    p = torch.softmax(z.double() / 0.8, -1)
    cdf = p.cumsum(-1)
    below = torch.where(found.tokens > 0, cdf.gather(1, (found.tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    above = cdf.gather(1, found.tokens[:, None])[:, 0]
    assert bool(((below - 1e-5 <= uniform) & (uniform <= above + 1e-5)).all())
    assert torch.equal(found.logprobs, reference.distribution(z, heat).gather(1, found.tokens[:, None])[:, 0])
    torch.testing.assert_close(found.entropy.double(), torch.special.entr(p).sum(-1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_a_token_without_mass_is_never_drawn(uniform: float) -> None:
    z = torch.full((8, 600), -torch.inf)
    z[torch.arange(8), torch.arange(8) * 70 + 3] = 1.0
    found = cpu.sample_tokens(z, torch.ones(8), torch.full((8,), uniform))
    assert found.tokens.tolist() == [i * 70 + 3 for i in range(8)]
    assert torch.count_nonzero(found.entropy) == 0


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    z = torch.zeros(8, 300)
    z[:, [120, 290]] = 2.0
    found = cpu.sample_tokens(z, torch.zeros(8), torch.full((8,), 0.9))
    truth = reference.sample_tokens(z, torch.zeros(8), torch.full((8,), 0.9))
    assert found.tokens.tolist() == [120] * 8
    for name in ("tokens", "logprobs", "processed_logprobs", "log_kept_mass"):
        assert torch.equal(getattr(found, name), getattr(truth, name)), name
    torch.testing.assert_close(found.entropy, truth.entropy, rtol=2e-6, atol=0)  # its sum has another order


# ---------------------------------------------------------------- where there is no extension


def test_without_a_compiler_the_reference_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(loader.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert loader.extension.__wrapped__() is None
    assert "no C++ compiler" in caplog.text
    monkeypatch.setattr(cpu, "extension", lambda: None)
    x = normal(5, 24)
    for op in ELEMENTWISE.values():
        for actual, expected in zip(op(cpu, x), op(reference, x), strict=True):
            assert torch.equal(actual, expected)


def test_a_failing_compiler_is_reported_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(loader.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(loader.BuildError, match="failed"):
        loader.build()
    assert not list(tmp_path.iterdir())


def test_other_dtypes_go_to_the_reference() -> None:
    x = normal(5, 24).bfloat16()
    assert torch.equal(cpu.swiglu(x), reference.swiglu(x))
    assert cpu.rms_norm(x, x[0], 1e-6).dtype == torch.bfloat16
