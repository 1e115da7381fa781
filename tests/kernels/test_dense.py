"""Linear, RMSNorm, RoPE and gated activations against float64, their gradients, and independence of the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kernels import (
    add_rms_norm,
    geglu,
    invariant_linear,
    linear,
    rms_norm,
    rope,
    rope_store,
    rope_tables,
    swiglu,
)
from kernels.reference.dense import llama3_inv_freq

pytestmark = pytest.mark.usefixtures("implementation")

FORWARD, BACKWARD = 2e-6, 1e-5
WIDTHS = (17, 131, 260)
EPS = 1e-5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest error in units of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# ---------------------------------------------------------------- float64, straight from the papers


def naive_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = (x[:, None, :] * weight[None]).sum(-1)
    return product if bias is None else product + bias


def naive_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt() * weight


def naive_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((naive_rms_norm(x + residual, weight), x + residual), -1)


def naive_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Element i of the first half and element i of the second are one complex number, turned by the angle."""
    half = cos.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)


def naive_swiglu(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    return torch.nn.functional.silu(gate_up[:, :half]) * gate_up[:, half:]


def naive_geglu(gate_up: Tensor) -> Tensor:
    half = gate_up.shape[-1] // 2
    return torch.nn.functional.gelu(gate_up[:, :half], approximate="tanh") * gate_up[:, half:]


def naive_offset_norm(x: Tensor, weight: Tensor) -> Tensor:
    return naive_rms_norm(x, 1 + weight)


def our_offset_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS, offset=True)


def our_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def our_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.cat(add_rms_norm(x, residual, weight, EPS), -1)


def rope_inputs(rows: int, width: int) -> tuple[Tensor, ...]:
    angle = randn(rows, width, seed=2) * 3
    return randn(rows, 3, 2 * width), torch.cos(angle), torch.sin(angle)


def partial_rope_inputs(rows: int, width: int) -> tuple[Tensor, ...]:
    """Five elements of each head pass, the others turn, by a matrix that also stretches (as LongRoPE's does)."""
    angle = randn(rows, width, seed=2) * 3
    return randn(rows, 3, 2 * width + 5), 1.2 * torch.cos(angle), 1.2 * torch.sin(angle)


Op = Callable[..., Tensor]
# name -> ours, naive, inputs for (rows, width), how many of the inputs are differentiable
OPS: dict[str, tuple[Op, Op, Callable[[int, int], tuple[Tensor, ...]], int]] = {
    "linear": (linear, naive_linear, lambda t, w: (randn(t, w), randn(w + 3, w, seed=1)), 2),
    "linear_bias": (linear, naive_linear, lambda t, w: (randn(t, w), randn(9, w, seed=1), randn(9, seed=2)), 3),
    "rms_norm": (our_rms_norm, naive_rms_norm, lambda t, w: (randn(t, w), randn(w, seed=1)), 2),
    "rms_norm_heads": (our_rms_norm, naive_rms_norm, lambda t, w: (randn(t, 3, w), randn(w, seed=1)), 2),
    "add_rms_norm": (
        our_add_rms_norm,
        naive_add_rms_norm,
        lambda t, w: (randn(t, w), randn(t, w, seed=1), randn(w, seed=2)),
        3,
    ),
    "rope": (rope, naive_rope, rope_inputs, 1),
    "offset_norm": (our_offset_norm, naive_offset_norm, lambda t, w: (randn(t, w), randn(w, seed=1)), 2),
    "partial_rope": (rope, naive_rope, partial_rope_inputs, 1),
    "geglu": (geglu, naive_geglu, lambda t, w: (randn(t, 2 * w) * 2,), 1),
    "swiglu": (swiglu, naive_swiglu, lambda t, w: (randn(t, 2 * w) * 4,), 1),
}


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OPS)
def test_forward_and_backward_match_float64(name: str, width: int, rows: int) -> None:
    ours, naive, make, num_differentiable = OPS[name]
    inputs = make(rows, width)
    mine = [x.clone().requires_grad_(i < num_differentiable) for i, x in enumerate(inputs)]
    wide = [x.double().requires_grad_(i < num_differentiable) for i, x in enumerate(inputs)]
    out, expected = ours(*mine), naive(*wide)
    assert out.dtype == torch.float32
    assert gap(out, expected) < FORWARD
    upstream = randn(*out.shape, seed=9)
    out.backward(upstream)
    expected.backward(upstream.double())
    for got, want in zip(mine[:num_differentiable], wide[:num_differentiable], strict=True):
        assert got.grad is not None and want.grad is not None
        assert gap(got.grad, want.grad) < BACKWARD


def test_rms_norm_eps_counts_where_the_row_is_tiny() -> None:
    x, weight = randn(8, 17) * 1e-3, torch.ones(17)
    assert gap(rms_norm(x, weight, EPS), naive_rms_norm(x.double(), weight.double())) < FORWARD


@pytest.mark.parametrize("name", OPS)
def test_half_precision_in_is_half_precision_out(name: str) -> None:
    ours, naive, make, num_differentiable = OPS[name]
    inputs = make(13, 131)
    halves = [x.bfloat16() if i < num_differentiable else x for i, x in enumerate(inputs)]
    out = ours(*halves)
    assert out.dtype == torch.bfloat16
    assert gap(out, naive(*(x.double() for x in halves))) < 2**-7


# ---------------------------------------------------------------- RoPE tables


@pytest.mark.parametrize("head_dim", [16, 20, 64, 128])
@pytest.mark.parametrize(
    "factor, low, high, original", [(32.0, 1.0, 4.0, 8192), (8.0, 1.0, 4.0, 8192), (4.0, 2.0, 8.0, 512)]
)
def test_llama3_frequencies_match_transformers(
    head_dim: int, factor: float, low: float, high: float, original: int
) -> None:
    theta = 500000.0
    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        },
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / theta ** (torch.arange(0, head_dim, 2).double() / head_dim)
    ours = llama3_inv_freq(plain.float(), factor=factor, low=low, high=high, original=original)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    ratio = plain / ours.double()
    # All three regions are there: kept, stretched, and something between.
    assert ((ratio - 1).abs() < 1e-5).any() and ((ratio - factor).abs() < 1e-5).any()
    assert ((ratio > 1.01) & (ratio < factor - 0.01)).any()


def test_rope_tables_match_transformers_at_long_positions() -> None:
    config = LlamaConfig(head_dim=64, hidden_size=256, num_attention_heads=4, max_position_embeddings=131072)
    embedding = LlamaRotaryEmbedding(config)
    positions = torch.tensor([0, 1, 2, 31, 32, 4095, 8191, 131071])
    cos, sin = embedding(torch.zeros(1), positions[None])
    ours = rope_tables(positions, embedding.inv_freq)
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == (8, 32)
        torch.testing.assert_close(mine, theirs[0, :, :32], rtol=0, atol=1e-6)


def test_rope_tables_match_float64_at_short_positions() -> None:
    positions = torch.arange(20)
    inv_freq = 10000.0 ** -(torch.arange(0, 20, 2) / 20)
    angle = positions.double()[:, None] * inv_freq.double()
    for mine, expected in zip(rope_tables(positions, inv_freq), (angle.cos(), angle.sin()), strict=True):
        assert gap(mine, expected) < FORWARD


def test_rope_store_turns_q_and_k_and_writes_k_and_v_where_the_slots_say() -> None:
    q, k, v = randn(3, 4, 20), randn(3, 2, 20, seed=1), randn(3, 2, 20, seed=2)
    cos, sin = rope_tables(torch.tensor([0, 5, 9]), randn(10, seed=3))
    k_cache, v_cache = (torch.full((2, 2, 32, 20), torch.nan) for _ in "kv")
    out = rope_store(q, k, v, cos, sin, k_cache, v_cache, torch.tensor([63, 0, 33]))
    assert torch.equal(out, rope(q, cos, sin))
    for token, (page, offset) in enumerate([(1, 31), (0, 0), (1, 1)]):
        assert torch.equal(k_cache[page, :, offset], rope(k, cos, sin)[token])
        assert torch.equal(v_cache[page, :, offset], v[token])
    assert k_cache.isfinite().sum() == v_cache.isfinite().sum() == 3 * 2 * 20


# ---------------------------------------------------------------- SwiGLU far from zero


@pytest.mark.parametrize("gate", [-200.0, -104.0, -89.0, -88.0, -20.0, 0.0, 20.0, 89.0, 200.0])
def test_swiglu_gradient_is_finite_and_right_at_extreme_gates(gate: float) -> None:
    gate_up = torch.tensor([[gate, 3.0]]).repeat(9, 1).requires_grad_()
    wide = gate_up.detach().double().requires_grad_()
    out, expected = swiglu(gate_up), naive_swiglu(wide)
    (grad,) = torch.autograd.grad(out.sum(), gate_up)
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    assert torch.isfinite(out).all() and torch.isfinite(grad).all()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("gate", [-1e6, -200.0, -5.0, -0.5, 0.0, 1e-3, 5.0, 200.0, 1e6])
def test_geglu_gradient_is_finite_and_right_at_extreme_gates(gate: float) -> None:
    gate_up = torch.tensor([[gate, 3.0]]).repeat(9, 1).requires_grad_()
    wide = gate_up.detach().double().requires_grad_()
    out, expected = geglu(gate_up), naive_geglu(wide)
    (grad,) = torch.autograd.grad(out.sum(), gate_up)
    (expected_grad,) = torch.autograd.grad(expected.sum(), wide)
    # 1 + tanh(u) cancels where u is far below zero, and leaves an absolute error
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=2e-6)


def test_offset_norm_keeps_what_bf16_would_round_away() -> None:
    """1 + weight is not a bf16 number for weights this small; the sum is taken in fp32."""
    x = randn(8, 64).bfloat16()
    weight = torch.full((64,), 2.0**-10).bfloat16()
    assert torch.equal((1 + weight), torch.ones(64).bfloat16())
    exact = naive_offset_norm(x.double(), weight.double())
    assert torch.equal(rms_norm(x, weight, EPS, offset=True), exact.bfloat16())
    assert not torch.equal(rms_norm(x, torch.zeros_like(weight), EPS, offset=True), exact.bfloat16())


# ---------------------------------------------------------------- bits do not depend on the company

ROWS = 320  # times 131 elements: more than the 32768 that torch hands to one thread
SHARED = {"linear": (1,), "linear_bias": (1, 2), "rms_norm": (1,), "rms_norm_heads": (1,), "add_rms_norm": (2,)}
SHARED["offset_norm"] = (1,)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", OPS)
def test_rows_keep_their_bits_in_any_company(
    name: str, width: int, threads: int, set_threads: Callable[[int], None]
) -> None:
    ours, _, make, _ = OPS[name]
    inputs = make(ROWS, width)
    set_threads(threads)
    whole = ours(*inputs)
    generator = torch.Generator().manual_seed(width)
    for count in (1, 2, 3, 5, 7, 8, 9, 16, 31, 100, ROWS - 1, ROWS):
        chosen = torch.randperm(ROWS, generator=generator)[:count]
        part = ours(*(x if i in SHARED.get(name, ()) else x[chosen] for i, x in enumerate(inputs)))
        assert torch.equal(part, whole[chosen]), f"{count} rows"


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", [name for name in OPS if not name.startswith("linear")])  # that one promises nothing
def test_rows_keep_their_bits_with_more_threads(
    name: str, width: int, threads: int, set_threads: Callable[[int], None]
) -> None:
    ours, _, make, _ = OPS[name]
    inputs = make(ROWS, width)
    set_threads(1)
    alone = ours(*inputs)
    set_threads(threads)
    assert torch.equal(ours(*inputs), alone)


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_heads_cut_from_a_wider_row_give_the_bits_of_a_copy(rows: int) -> None:
    """The decoder norms and turns views into the fused q/k/v projection."""
    q, k, _ = randn(rows, 7, 20).split((4, 2, 1), 1)
    weight = randn(20, seed=1)
    cos, sin = rope_tables(torch.arange(rows), randn(10, seed=2))
    for heads in (q, k):
        assert torch.equal(our_rms_norm(heads, weight), our_rms_norm(heads.clone(), weight))
        assert torch.equal(rope(heads, cos, sin), rope(heads.clone(), cos, sin))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("out_features, in_features", [(768, 256), (257, 1031)])
def test_linear_keeps_its_bits_at_model_like_sizes(
    out_features: int, in_features: int, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    x, weight = randn(1024, in_features), randn(out_features, in_features, seed=1)
    whole = linear(x, weight)
    for begin, end in ((0, 1), (1023, 1024), (5, 18), (64, 128), (3, 700)):
        assert torch.equal(linear(x[begin:end], weight), whole[begin:end])


def test_invariant_linear_is_linear_on_a_cpu_where_that_is_invariant() -> None:
    x, weight, bias = randn(13, 40), randn(9, 40, seed=1), randn(9, seed=2)
    assert torch.equal(invariant_linear(x, weight, bias), linear(x, weight, bias))
    assert gap(invariant_linear(x, weight, bias), naive_linear(x.double(), weight.double(), bias.double())) < FORWARD
