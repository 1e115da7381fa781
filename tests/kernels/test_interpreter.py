"""The interpreter that all kernel tests rest on: narrow floats against torch, bit by bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _arithmetic_kernel(x, y, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a * b + a)
    tl.store(out + N + i, tl.where(a > b, a, b))
    tl.store(out + 2 * N + i, -a / 3.0)
    total = tl.zeros([N], tl.float32)
    for _ in range(0, n):
        total += a
    tl.store(out + 3 * N + i, total.to(out.dtype.element_ty))


@triton.jit
def _cast_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _dot_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)).to(out.dtype.element_ty))


def values(n: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * 4).to(device)


def test_bf16_arithmetic_rounds_to_nearest_even(device: torch.device) -> None:
    x, y = (values(64, seed, device).bfloat16() for seed in (0, 1))
    out = torch.empty(4, 64, dtype=torch.bfloat16, device=device)
    _arithmetic_kernel[(1,)](x, y, out, 3, N=64)
    fused = (x.double() * y.double() + x.double()).to(torch.bfloat16)  # a GPU may round once, or twice
    twice = (x * y) + x
    assert ((out[0] == fused) | (out[0] == twice)).all()
    assert torch.equal(out[1], torch.maximum(x, y))
    assert torch.equal(out[2], (-x.float() / 3).bfloat16())
    assert torch.equal(out[3], (x.float() + x.float() + x.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_round_and_saturate(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.cat([values(120, 2, device), torch.tensor([0.0, -0.0, 1e-9, 447.0, 1e4, -1e4, 3e-3, 1.0], device=device)])
    out = torch.empty(128, dtype=dtype, device=device)
    _cast_kernel[(1,)](x, out, N=128)
    limit = torch.finfo(dtype).max
    assert torch.equal(out.float(), x.clamp(-limit, limit).to(dtype).float())
    back = torch.empty(128, device=device)
    _cast_kernel[(1,)](out, back, N=128)
    assert torch.equal(back, out.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dots_accumulate_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    x, y = (values(64 * 64, seed, device).view(64, 64).to(dtype) for seed in (3, 4))
    out = torch.empty(64, 64, device=device)
    _dot_kernel[(1,)](x, y, out, N=64)
    truth = x.double() @ y.double()
    assert (out.double() - truth).abs().max() <= 1e-5 * truth.abs().max()
