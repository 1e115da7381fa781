"""Elementary functions that kernels share. Exponentials are to base 2, as the hardware's are."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1000.0)  # exponent that gives 0 in fp32, and 0 * -1000 isn't NaN, as 0 * -inf would be


@triton.jit
def tanh(x):
    """To a few units in the last place also near 0, where 1 - 2 / (exp(2x) + 1) keeps no small digits.

    There a polynomial: (tanh(x) / x - 1) / x^2 interpolated at Chebyshev points of x^2 in [0, 0.3].
    """
    square = x * x
    series = ((-0.00662717 * square + 0.0213181864) * square - 0.0539108359) * square + 0.133331208
    small = x + x * square * (series * square - 0.333333321)
    return tl.where(square < 0.3, small, 1 - 2 / (tl.exp2(x * (2 * LOG2E)) + 1))
