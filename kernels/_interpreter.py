"""Repair Triton's interpreter, so that kernels can be tested without a GPU.

In triton 3.6 to 3.9 the interpreter keeps bf16 as uint16 and computes on the bits: products are
silently wrong by nine orders of magnitude, fp32 -> bf16 truncates where the hardware rounds, and
(3.6 with numpy >= 2.4) a loop bound held in a tensor crashes. `repair` patches these inside
triton.runtime.interpreter. It is the only place in the package that patches a library.

It also halves the time: the interpreter replaces the functions of triton.language before every call
of a device function, tl.sum and tl.max among them, and leaves them replaced. The patch does it once
for each launch and restores all of them afterwards.
"""

import functools
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _f32(handle) -> np.ndarray:
    """Return the numbers of an interpreter tensor of 16-bit floats, as fp32."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of x in bf16, rounded to nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


@functools.cache
def repair() -> None:
    """Patch the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    dot, cast, binary = builder.create_dot, builder.cast_impl, builder.binary_op
    patch_tensor, patch_lang = interpreter._patch_lang_tensor, interpreter._patch_lang

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if {a.dtype.scalar, b.dtype.scalar} & {tl.bfloat16, tl.float16}:
            product = np.matmul(_f32(a), _f32(b)) + d.data
            return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(_round_to_bf16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def binary_op(self, lhs, rhs, op):
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar) and op in ARITHMETIC:
            raise TypeError("bf16 arithmetic in the interpreter: cast to fp32 first")
        return binary(self, lhs, rhs, op)

    def patch_lang_tensor(tensor, *args, **kwargs):
        result = patch_tensor(tensor, *args, **kwargs)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        return result

    def patch_all(fn):
        seen = SimpleNamespace(__globals__={**fn.__globals__, "tl": tl, "core": tl.core})
        return patch_lang(seen)

    def call_device_function(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    builder.create_dot, builder.cast_impl, builder.binary_op = create_dot, cast_impl, binary_op
    builder.create_fp_trunc = cast_impl
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter._patch_lang = patch_all
    interpreter.InterpretedFunction.__call__ = call_device_function


ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum)
