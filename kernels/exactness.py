"""Start-up check of ``numerics: exact``: does this machine give row-invariant results?

The design rests on how this torch build and this CPU sum (``kernels.reference``). Rather than trust a
table of machines, an engine in exact mode asks once, on its own weight shapes, and refuses to start
where the answer is no.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels import (
    AttentionKind,
    attend_paged,
    distribution,
    geglu,
    invariant_linear,
    plan_tiles,
    rms_norm,
    rope,
    rope_tables,
    swiglu,
)

ROW_COUNTS = (1, 3, 8, 17, 40)
ATTENTION_KINDS = (AttentionKind(), AttentionKind(scale=0.1, softcap=3.0, window=25))


def check_exact(
    linear_shapes: Iterable[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    biased_shapes: Iterable[tuple[int, int]] = (),
) -> None:
    """Compare rows computed alone and in company, for each (out, in) linear and the attention shape.

    ``biased_shapes``: those of the linears that have a bias.
    Raises RuntimeError naming the op that depends on the batch; the way out is ``numerics: fast``.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for out_features, in_features in sorted(set(linear_shapes)):
        x, weight = random(ROW_COUNTS[-1], in_features), random(out_features, in_features)
        whole = invariant_linear(x, weight)
        for rows in ROW_COUNTS[:-1]:
            part = invariant_linear(x[-rows:].contiguous(), weight)
            _expect_equal(part, whole[-rows:], f"linear {in_features} -> {out_features}")
        _check_elementwise(x, whole)
    for out_features, in_features in sorted(set(biased_shapes)):
        x, weight, bias = random(ROW_COUNTS[-1], in_features), random(out_features, in_features), random(out_features)
        whole = invariant_linear(x, weight, bias)
        for rows in ROW_COUNTS[:-1]:
            part = invariant_linear(x[-rows:].contiguous(), weight, bias)
            _expect_equal(part, whole[-rows:], f"linear {in_features} -> {out_features} with a bias")
    _check_heads(random, num_heads, head_dim)
    for kind in ATTENTION_KINDS:
        _check_attention(random, num_heads, num_kv_heads, head_dim, device, kind)


def _check_elementwise(x: Tensor, wide: Tensor) -> None:
    ones = torch.ones_like(x[0])
    heat = torch.full((len(wide),), 0.7, device=wide.device)
    even = wide[:, : wide.shape[1] // 2 * 2]
    ops = {
        "rms_norm": (lambda t, _: rms_norm(t, ones, 1e-6), x, heat),
        "swiglu": (lambda t, _: swiglu(t), even, heat),
        "geglu": (lambda t, _: geglu(t), even, heat),
        "tanh": (lambda t, _: torch.tanh(t), wide, heat),
        "log_softmax": (distribution, wide, heat),
    }
    for name, (op, data, second) in ops.items():
        whole = op(data, second)
        # log-softmax only ever sees multiples of eight rows; the others take what comes.
        for rows in (8, 16) if name == "log_softmax" else ROW_COUNTS[:-1]:
            part = slice(len(data) - rows, len(data))
            _expect_equal(op(data[part].contiguous(), second[part]), whole[part], f"{name} of width {data.shape[1]}")


def _check_attention(
    random: Callable[..., Tensor],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    kind: AttentionKind,
) -> None:
    """A sequence of 70 tokens in one piece, against chunks of odd sizes and single tokens in other pages."""
    length, pages = 70, 6
    positions = torch.arange(length, device=device)
    inv_freq = 10000 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    q = rope(random(length, num_heads, head_dim), *rope_tables(positions, inv_freq))
    k, v = random(length, num_kv_heads, head_dim), random(length, num_kv_heads, head_dim)

    def run(cuts: list[int], table: list[int]) -> Tensor:
        shape = (pages, num_kv_heads, 32, head_dim)
        k_cache, v_cache = k.new_zeros(shape), v.new_zeros(shape)
        parts = []
        for begin, end in itertools.pairwise(cuts):
            at = positions[begin:end]
            slots = torch.tensor(table, device=device)[at // 32] * 32 + at % 32
            plan = plan_tiles([end - begin], [end], [table], device, kind.window, exact=True)
            parts.append(attend_paged(q[begin:end], k[begin:end], v[begin:end], k_cache, v_cache, slots, plan, kind))
        return torch.cat(parts)

    whole = run([0, length], [0, 1, 2])
    _expect_equal(
        run([0, 1, 2, 19, 33, 34, 64, 65, length], [5, 1, 3]),
        whole,
        "attention" if kind.window is None else "windowed attention",
    )


def _check_heads(random: Callable[..., Tensor], num_heads: int, head_dim: int) -> None:
    """What happens to a head before attention: its norm and its rotation, for a few tokens and for many."""
    x, ones = random(ROW_COUNTS[-1], num_heads, head_dim), random(head_dim).abs()
    cos, sin = (random(ROW_COUNTS[-1], head_dim // 2).float() for _ in range(2))
    for name, op in (("rms_norm", lambda t, *_: rms_norm(t, ones, 1e-6)), ("rope", rope)):
        whole = op(x, cos, sin)
        for rows in ROW_COUNTS[:-1]:
            alone = op(x[-rows:].contiguous(), cos[-rows:].contiguous(), sin[-rows:].contiguous())
            _expect_equal(alone, whole[-rows:], f"{name} of heads of {head_dim}")


def _expect_equal(part: Tensor, whole: Tensor, what: str) -> None:
    if not torch.equal(part, whole):
        gap = (part - whole).abs().max().item()
        here = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        raise RuntimeError(
            f"numerics: exact needs results that do not depend on the batch, but {what} differs by {gap:.1e} when "
            f"its rows come {len(part)} at a time or otherwise divided ({here}). "
            "Set numerics: fast, or change the number of threads."
        )
