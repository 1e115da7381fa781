"""The packed attention kernels against the naive form in float64, forward and backward, and against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from accuracy import BACKWARD, FORWARD, assert_close_to_truth, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import layout, naive, qkv
from torch import Tensor

from kernels import AttentionKind, reference
from kernels.device import default_device
from kernels.triton.packed_attention import attend_packed, packed_attention

pytestmark = pytest.mark.usefixtures("poisoned")
KINDS = {
    "causal": AttentionKind(),
    "scale": AttentionKind(scale=0.7),
    "softcap": AttentionKind(softcap=1.5),  # scores reach 4
    "softcap_50": AttentionKind(softcap=50.0),
    "window_1": AttentionKind(window=1),
    "window_20": AttentionKind(window=20),
    "window_33": AttentionKind(window=33),
    "window_50": AttentionKind(window=50),
    "window_1000": AttentionKind(window=1000),
    "all": AttentionKind(scale=0.4, softcap=2.0, window=45),
}
# Blocks are of 32 in fp32: lengths on both sides of their borders, one token, none; own tokens after a shared prefix.
WHOLE = ((70, 0, 1, 33), (70, 0, 1, 33))
PREFIXED = ((1, 20, 0, 32), (40, 20, 7, 97))
Shape = tuple[Sequence[int], Sequence[int]]


def gradients(attend: Callable[..., Tensor], tensors: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def joined(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def check(shape: Shape, heads: tuple[int, int], dim: int, kind: AttentionKind, dtype: torch.dtype, device) -> None:
    """Kernels against float64; in narrow floats, as close as the naive form; in fp32, as close as the reference."""
    tensors = qkv(*shape, heads, dim, dtype, device)
    dout = normal(*tensors[0].shape, seed=9, dtype=dtype, device=device)
    rest = layout(*shape, device, kind.window)
    found = gradients(lambda *x: packed_attention(*x, *rest, kind), tensors, dout)
    truth = gradients(lambda *x: naive(*x, *shape, kind)[0], [x.double() for x in tensors], dout)
    assert all(x.dtype == dtype for x in found)
    if dtype != torch.float32:
        plain = gradients(lambda *x: naive(*x, *shape, kind)[0], tensors, dout)
        for a, b, c in zip(found, plain, truth, strict=True):
            assert_close_to_truth(a, c, b)
        return
    other = gradients(lambda *x: reference.packed_attention(*x, *rest, kind), tensors, dout)
    assert_close_to_truth(found[0], truth[0])
    assert_close_to_truth(found[0], other[0].double(), bound=2 * FORWARD)
    # Together: a token that sees but itself has a softmax of 1, and a true dq and dk of 0.
    assert_close_to_truth(joined(found[1:]), joined(truth[1:]), bound=BACKWARD)
    assert_close_to_truth(joined(found[1:]), joined(other[1:]).double(), bound=BACKWARD)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name: str, device: torch.device) -> None:
    check(PREFIXED, (4, 2), 16, KINDS[name], torch.float32, device)


@pytest.mark.parametrize(("heads", "shape"), [((2, 2), WHOLE), ((4, 1), PREFIXED), ((8, 1), ((33,), (40,)))], ids=str)
def test_groups_of_heads(heads: tuple[int, int], shape: Shape, device: torch.device) -> None:
    check(shape, heads, 32, AttentionKind(), torch.float32, device)


@pytest.mark.parametrize("dim", [7, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int, device: torch.device) -> None:
    check(((33, 2), (34, 2)), (2, 1), dim, AttentionKind(), torch.float32, device)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65])
def test_lengths_about_a_block(length: int, device: torch.device) -> None:
    check(((length,), (length,)), (1, 1), 16, AttentionKind(window=length), torch.float32, device)


@pytest.mark.parametrize("window", [None, 2, 33, 34, 63, 64])
def test_windows_and_prefixes_about_a_block(window: int | None, device: torch.device) -> None:
    """Where a mask or a range that is off by one would hide a key, or show it."""
    before = (0, 1, 30, 31, 32)
    shape = ([34] * len(before), [34 + n for n in before])
    check(shape, (1, 1), 16, AttentionKind(window=window), torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "all"])
@pytest.mark.parametrize("shape", [((129, 3), (129, 3)), ((5, 64), (70, 193))], ids=str)
def test_narrow_floats(shape: Shape, name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(shape, (2, 1), 64, KINDS[name], dtype, device)


@pytest.mark.parametrize("dim", [16, 96, 128, 256])
def test_narrow_floats_by_head_dim(dim: int, device: torch.device) -> None:
    check(((40,), (70,)), (2, 1), dim, AttentionKind(), torch.bfloat16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "all", "window_1000"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_real_sizes(dim: int, name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(((1500, 1, 700), (1500, 2000, 2700)), (16, 4), dim, KINDS[name], dtype, device)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 60),
    softcap=st.none() | st.floats(0.5, 50),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
def test_ragged_batches(
    lengths: list[tuple[int, int]], window: int | None, softcap: float | None, heads: tuple[int, int]
) -> None:
    """Lengths of own tokens, and of what comes before them."""
    queries, contexts = [own for own, _ in lengths], [own + before for own, before in lengths]
    kind = AttentionKind(scale=0.3, softcap=softcap, window=window)
    if sum(queries):
        check((queries, contexts), heads, 16, kind, torch.float32, default_device())


@pytest.mark.parametrize("name", ["causal", "softcap", "window_20"])
def test_the_log_sum_exp(name: str, device: torch.device) -> None:
    tensors = qkv(*PREFIXED, (4, 2), 16, device=device)
    plan = layout(*PREFIXED, device)[2]
    out, lse = attend_packed(*tensors, plan, KINDS[name])
    true_out, true_lse = naive(*(x.double() for x in tensors), *PREFIXED, KINDS[name])
    assert lse.dtype == torch.float32
    assert_close_to_truth(out, true_out)
    assert_close_to_truth(lse, true_lse)


def test_no_tokens_at_all(device: torch.device) -> None:
    for shape in (((), ()), ((0, 0), (0, 0)), ((0,), (5,))):
        tensors = qkv(*shape, (2, 1), 16, device=device)
        out, *grads = gradients(lambda *x, s=shape: packed_attention(*x, *layout(*s, device)), tensors, tensors[0])
        assert out.shape == tensors[0].shape
        # Keys that nobody looks at have a gradient of 0, not what lay in memory.
        assert not any(grad.any() for grad in grads)


def test_large_scores_neither_overflow_nor_lose_the_softmax(device: torch.device) -> None:
    q, k, v = qkv(*WHOLE, (2, 1), 16, device=device)
    q = q * 100
    truth = naive(*(x.double() for x in (q, k, v)), *WHOLE, AttentionKind())[0]
    assert_close_to_truth(packed_attention(q, k, v, *layout(*WHOLE, device)), truth, bound=1e-4)


@pytest.mark.parametrize("window", [None, 1, 33, 40])
def test_a_token_is_seen_by_its_successors_in_the_window(window: int | None, device: torch.device) -> None:
    shape = ((70, 5), (70, 20))
    rest = (*layout(*shape, device), AttentionKind(window=window))
    q, k, v = qkv(*shape, (2, 1), 16, device=device)
    before = packed_attention(q, k, v, *rest)
    for token in (0, 31, 32, 63, 69):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[token] += 1
        changed_v[token] -= 1
        differs = (packed_attention(q, changed_k, changed_v, *rest) != before).flatten(1).any(1)
        assert differs.tolist() == [token <= t < min(70, token + (window or 70)) for t in range(75)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_give_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    shape, kind = ((33,), (40,)), AttentionKind(window=35)
    tensors = qkv(*shape, (2, 1), 16, dtype, device)
    dout = normal(*tensors[0].shape, seed=9, device=device)
    rest = layout(*shape, device)
    first = gradients(lambda *x: packed_attention(*x, *rest, kind), tensors, dout)
    for _ in range(20):
        again = gradients(lambda *x: packed_attention(*x, *rest, kind), tensors, dout)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype, device: torch.device) -> None:
    queries, contexts = (35, 3, 40), (35, 50, 70)
    kind = AttentionKind(window=45)
    tensors = qkv(queries, contexts, (2, 1), 16, dtype, device)
    dout = normal(*tensors[0].shape, seed=9, device=device)
    batch = gradients(lambda *x: packed_attention(*x, *layout(queries, contexts, device), kind), tensors, dout)
    ends = [list(itertools.accumulate(lens)) for lens in (queries, contexts)]
    for i, (n, m) in enumerate(zip(queries, contexts, strict=True)):
        own, keys = slice(ends[0][i] - n, ends[0][i]), slice(ends[1][i] - m, ends[1][i])
        rest = layout([n], [m], device)
        parts = [tensors[0][own], tensors[1][keys], tensors[2][keys]]
        alone = gradients(lambda *x, r=rest: packed_attention(*x, *r, kind), parts, dout[own])
        assert all(torch.equal(a, b[s]) for a, b, s in zip(alone, batch, (own, own, keys, keys), strict=True))


@pytest.mark.parametrize("window", [None, 30])
def test_a_query_alone_has_the_bits_it_has_among_others(window: int | None, device: torch.device) -> None:
    """Key blocks count from the start of the context, whichever queries are there."""
    q, k, v = qkv([70], [70], (2, 1), 16, device=device)
    kind = AttentionKind(window=window)
    whole = packed_attention(q, k, v, *layout([70], [70], device), kind)
    for last in (1, 32, 33, 50, 70):
        for own in (1, 5):
            part = slice(max(0, last - own), last)
            rest = layout([part.stop - part.start], [last], device)
            assert torch.equal(packed_attention(q[part], k[:last], v[:last], *rest, kind), whole[part])
