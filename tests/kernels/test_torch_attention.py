"""Torch's own attention means what the reference means, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

from kernels import AttentionKind
from kernels.reference import Spans
from kernels.torch_attention import padded_attention, varlen_attention

KINDS = [AttentionKind(), AttentionKind(scale=0.3), AttentionKind(window=1), AttentionKind(window=5)]
SHAPES = [((3,), (3,)), ((1, 1, 1), (1, 40, 7)), ((5, 1, 17), (5, 33, 40)), ((2, 64), (64, 64))]


def naive(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    kind: AttentionKind,
) -> torch.Tensor:
    """Sequence by sequence, head by head, token by token."""
    scale = kind.scale or 1 / math.sqrt(q.shape[2])
    group = q.shape[1] // k.shape[1]
    rows = []
    first_query = first_key = 0
    for num_queries, num_keys in zip(queries, keys, strict=True):
        for i in range(num_queries):
            last = num_keys - num_queries + i
            begin = 0 if kind.window is None else max(0, last + 1 - kind.window)
            span = slice(first_key + begin, first_key + last + 1)
            heads = []
            for h in range(q.shape[1]):
                scores = k[span, h // group] @ q[first_query + i, h] * scale
                heads.append(scores.softmax(0) @ v[span, h // group])
            rows.append(torch.stack(heads))
        first_query, first_key = first_query + num_queries, first_key + num_keys
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
def test_values_and_gradients_are_those_of_the_naive_form(
    kind: AttentionKind, shape: tuple[tuple[int, ...], tuple[int, ...]], heads: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = shape

    def random(rows: int, count: int) -> torch.Tensor:
        return torch.randn(rows, count, 8, dtype=torch.float64, generator=generator).requires_grad_()

    q, k, v = random(sum(queries), heads[0]), random(sum(keys), heads[1]), random(sum(keys), heads[1])
    out = padded_attention(q, k, v, Spans.of(queries, "cpu"), Spans.of(keys, "cpu"), kind)
    truth = naive(q, k, v, queries, keys, kind)
    assert torch.allclose(out, truth, atol=1e-12)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    for found, wanted in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(truth, (q, k, v), upstream), strict=True
    ):
        assert torch.allclose(found, wanted, atol=1e-12)


def test_a_soft_cap_is_refused() -> None:
    x, spans = torch.zeros(1, 1, 8), Spans.of([1], "cpu")
    with pytest.raises(ValueError, match=r"softcap=3\.0: torch's attention has none"):
        varlen_attention(x, x, x, spans, spans, AttentionKind(softcap=3.0))
