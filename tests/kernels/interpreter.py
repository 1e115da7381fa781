"""Triton's interpreter, made to compute as a GPU does.

As shipped (3.6 to 3.9) it does bf16 arithmetic on the bits as integers, truncates on the way to bf16, and lets fp8
overflow: wrong numbers, and no error. Here every operation on a narrow float is done in fp32 and rounded to the
nearest, ties to even; fp8 saturates, as the GPU's conversion instruction does. Loops over runtime bounds, which 3.6
refuses under numpy 2.4, work. And a call of a device function doesn't patch the whole language once more, which took
most of the time of kernels that have some.

The environment must say TRITON_INTERPRET=1 before the first kernel is defined: ``tests/conftest.py`` sees to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

NARROW = {
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
    tl.float8e5: (torch.float8_e5m2, np.uint8),
}
FLOATS = {tl.float16: np.float16, tl.float32: np.float32, tl.float64: np.float64}
Handle = interpreter.TensorHandle


def widen(handle: Any) -> np.ndarray:
    """The handle's values; those of a narrow float as fp32, and fp16 as it is."""
    narrow = NARROW.get(handle.dtype.scalar)
    if narrow is None:
        return handle.data
    # A copy, since torch refuses strides that numpy's broadcasts have.
    return torch.from_numpy(np.array(handle.data)).view(narrow[0]).float().numpy()


def rounded(values: np.ndarray, dtype: Any) -> Any:
    """Values as a handle of a float type, rounded to the nearest even; fp8 saturates."""
    if dtype.scalar not in NARROW:
        return Handle(np.asarray(values).astype(FLOATS[dtype.scalar]), dtype.scalar)
    torch_dtype, bits = NARROW[dtype.scalar]
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    if torch_dtype is not torch.bfloat16:
        limit = torch.finfo(torch_dtype).max
        wide = wide.clamp(-limit, limit)
    return Handle(
        wide.to(torch_dtype).view(torch.uint8 if bits is np.uint8 else torch.int16).numpy().view(bits), dtype.scalar
    )


class GpuBuilder(interpreter.InterpreterBuilder):
    """What an operation of the kernel language does to numpy arrays."""

    def _narrow(self, op: Callable[..., Any], *handles: Any) -> Any:
        """``op`` on the values; a float result has the type of the last operand."""
        result = op(*(widen(h) for h in handles))
        dtype = handles[-1].dtype.scalar
        return rounded(result, dtype) if result.dtype.kind == "f" else Handle(result, dtype)

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if lhs.dtype.scalar in NARROW:
            return self._narrow(op, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg: Any, op: Callable[..., Any]) -> Any:
        return self._narrow(op, arg) if arg.dtype.scalar in NARROW else super().unary_op(arg, op)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if arg.dtype.scalar in NARROW:
            return self._narrow(np.clip, arg, lo, hi)
        return super().create_clampf(arg, lo, hi, propagate_nans)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar in NARROW:
            return self._narrow(lambda a, b, c: a * b + c, x, y, z)
        return super().create_fma(x, y, z)

    def create_rsqrt(self, arg: Any) -> Any:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return rounded(widen(src), dst_type)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        to_float, from_narrow = dst_type.scalar in NARROW or dst_type.scalar in FLOATS, src.dtype.scalar in NARROW
        if to_float and (from_narrow or dst_type.scalar in NARROW):
            return rounded(widen(src), dst_type)
        if from_narrow:
            return Handle(widen(src).astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def get_bf16(self, value: float) -> Any:
        return rounded(np.array([value], dtype=np.float32), tl.bfloat16)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(widen(a).astype(d.data.dtype), widen(b).astype(d.data.dtype))
        return Handle(product + d.data, d.dtype.scalar)


@functools.cache
def _patch_once(fn: Any) -> None:
    interpreter._patch_lang(fn)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a device function; its kernel's launch has patched the language that both use."""
    _patch_once(self.fn)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    """Let the process's interpreter compute so."""
    interpreter.interpreter_builder.__class__ = GpuBuilder
    interpreter.InterpretedFunction.__call__ = _call
    if not hasattr(tl.tensor, "__index__"):
        tl.tensor.__index__ = lambda self: int(self.handle.data.item())
