"""The batch-invariant product: against float64, and a row's bits for every number of rows beside it.

The interpreter sums a tile with numpy, whose product may depend on a tile's shape. Independence of the batch is
therefore shown on whole numbers, of which every sum is exact, and by what decides the order on a GPU: one instruction
kind, one way of dividing k.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from accuracy import BACKWARD, assert_close_to_truth, normal
from torch import Tensor
from vast import far_apart

from kernels import reference
from kernels.triton.matmul import invariant_linear, tile_for

pytestmark = pytest.mark.usefixtures("poisoned")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 16, 8), (1, 1, 1), (3, 64, 64), (17, 33, 70), (65, 130, 129), (130, 96, 40)]  # tokens, in, out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens, in_features, out_features", SHAPES)
def test_forward_and_backward(
    tokens: int, in_features: int, out_features: int, with_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    shapes = [(tokens, in_features), (out_features, in_features), (out_features,)][: 3 if with_bias else 2]
    data = [normal(*shape, seed=i, dtype=dtype, device=device) for i, shape in enumerate(shapes)]
    dout = normal(tokens, out_features, seed=5, dtype=dtype, device=device)

    def run(op: object, wide: bool) -> list[Tensor]:
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in data]
        out = op(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    def naive(x: Tensor, weight: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        return (x[:, None] * weight).sum(-1) + bias

    found, plain, wanted = run(invariant_linear, False), run(reference.linear, False), run(naive, True)
    for i, (a, b, c) in enumerate(zip(found, plain, wanted, strict=True)):
        assert a.dtype == dtype
        assert_close_to_truth(a, c, None if dtype == torch.float32 else b, BACKWARD if i else 2e-6)


@pytest.mark.parametrize(
    "dtype, counts",
    [(torch.bfloat16, range(1, 131)), (torch.float32, (1, 31, 32, 33, 65, 130)), (torch.float16, (1, 17, 33, 65, 130))],
)
def test_a_row_has_the_same_bits_among_1_to_130_rows(
    dtype: torch.dtype, counts: Sequence[int], device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-4, 5, shape, generator=generator).to(device, dtype) for shape in ((130, 72), (20, 72), (20,))
    )
    whole = invariant_linear(x, weight, bias)
    assert torch.equal(whole.double(), (x.double() @ weight.double().T + bias.double()).to(dtype).double())
    for rows in counts:
        begin = (130 - rows) // 2
        assert torch.equal(invariant_linear(x[begin : begin + rows], weight, bias), whole[begin : begin + rows]), rows


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_real_numbers_has_the_same_bits_at_any_place_among_any_number(
    dtype: torch.dtype, device: torch.device
) -> None:
    """What the interpreter can't show: that sums inside an instruction have one order, too."""
    x, weight = normal(2500, 4096, dtype=dtype, device=device), normal(1000, 4096, seed=1, dtype=dtype, device=device)
    whole = invariant_linear(x, weight)
    for rows in (*range(1, 131), 255, 256, 257, 1000, 1024, 1025, 2047, 2499):
        for begin in (0, 1, 2500 - rows):
            assert torch.equal(invariant_linear(x[begin : begin + rows], weight), whole[begin : begin + rows]), rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_run(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = normal(20, 96, dtype=dtype, device=device), normal(33, 96, seed=1, dtype=dtype, device=device)
    first = invariant_linear(x, weight)
    assert all(torch.equal(invariant_linear(x, weight), first) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [1, 40, 64, 100, 4096])
def test_k_is_divided_alike_for_any_number_of_rows(in_features: int, dtype: torch.dtype) -> None:
    tiles = {tile_for(tokens, in_features, dtype, CPU) for tokens in range(1, 5000)}
    assert len({tile.k for tile in tiles}) == 1
    assert all(tile.out >= 64 and tile.tokens >= 16 and tile.k >= 16 for tile in tiles)
    assert len(tiles) == (1 if dtype == torch.float32 else 5)


def test_programs_are_ordered_so_that_each_tile_is_computed_once(device: torch.device) -> None:
    """More blocks of tokens than a group has, and a last group that isn't full."""
    x = normal(32 * 19 + 1, 16, device=device)
    weight = normal(130, 16, seed=1, device=device)
    out = invariant_linear(x, weight)
    assert_close_to_truth(out, x.double() @ weight.double().T)


def test_strides(device: torch.device) -> None:
    x, weight = normal(5, 80, device=device)[:, 7:55], normal(9, 60, seed=1, device=device)[:, 3:51]
    expected = invariant_linear(x.contiguous(), weight.contiguous())
    assert torch.equal(invariant_linear(x, weight), expected)
    assert torch.equal(invariant_linear(x.T.contiguous().T, weight), expected)


def test_rows_beyond_2_to_the_31_elements(device: torch.device) -> None:
    near = normal(3, 48, dtype=torch.bfloat16, device=device)
    far = far_apart(near)
    other = normal(3, 48, seed=1, dtype=torch.bfloat16, device=device)
    assert torch.equal(invariant_linear(far, other), invariant_linear(near, other))
    assert torch.equal(invariant_linear(other, far), invariant_linear(other, near))


@pytest.mark.parametrize(
    "x, weight, bias, message",
    [
        ((2, 3, 4), (5, 4), (5,), r"invariant_linear: the shape of x is \(2, 3, 4\); expected \[tokens, in\]"),
        ((3, 4), (5, 6), (5,), r"invariant_linear: the shape of weight is \(5, 6\); expected \[out, 4\]"),
        ((3, 4), (5, 4), (4,), r"invariant_linear: the shape of bias is \(4,\); expected \[5\]"),
    ],
)
def test_wrong_shapes_are_named(
    x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        invariant_linear(torch.zeros(x), torch.zeros(weight), torch.zeros(bias))


def test_wrong_dtypes_and_strides_are_named() -> None:
    x, weight = torch.zeros(3, 4), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"weight.dtype is torch.bfloat16; expected that of x, torch.float32"):
        invariant_linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"strides of weight is \(1, 5\); expected 1 along in: store it as \[out"):
        invariant_linear(x, torch.zeros(4, 5).T)
