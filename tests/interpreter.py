"""Triton's interpreter, mended: bfloat16 as numbers, not as bits, rounded to nearest even; loops to a run-time bound.

It keeps bfloat16 as uint16.  Its products multiply those bits, its casts truncate, and arithmetic works on the bits too
(triton 3.6.0 to 3.9.0); with NumPy 2.4 a loop to a run-time number fails (3.6.0).  And three quarters of its time go by
without need (3.6.0): every call of a device function patches the whole language again, every tensor makes its shape
anew and is broadcast to it, sums of integers are made once more to see whether they overflow, and nothing is said if
they do.
Private names are patched here, and tests/kernels/test_interpreter.py fails where one of the mends is no longer needed
or no longer enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

#: What was there before `apply`, by name.
original = {
    "create_dot": Builder.create_dot,
    "cast_impl": Builder.cast_impl,
    "create_fp_to_fp": Builder.create_fp_to_fp,
    "binary_op": Builder.binary_op,
    "_patch_lang_tensor": interpreter._patch_lang_tensor,
    "_patch_lang": interpreter._patch_lang,
    "_get_np_dtype": interpreter._get_np_dtype,
    "block_type": tl.block_type.__init__,
    "tensor": tl.tensor.__init__,
    "broadcast_impl_value": TritonSemantic.broadcast_impl_value,
}
_ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.maximum, np.minimum)
_INTEGERS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers that uint16 `bits` are the upper halves of."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bits(numbers: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, to nearest even, as uint16."""
    u = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    # NumPy's order of summation depends on the shape, a device's does not: a score and its transposed twin, which
    # backward computes again, are to have the same bits.  In float64 they do.
    a, b = (Handle(_numbers(x).astype(np.float64), tl.float64) for x in (a, b))
    product = original["create_dot"](self, a, b, Handle(np.zeros_like(d.data, dtype=np.float64), tl.float64), *rest)
    return Handle((product.data + d.data).astype(d.data.dtype), d.dtype.scalar)


def _numbers(handle: Any) -> np.ndarray:
    return to_float32(handle.data) if _is_bfloat16(handle) else handle.data


def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target != tl.bfloat16:
        src = Handle(to_float32(src.data), tl.float32)
        return src if target == tl.float32 else original["cast_impl"](self, src, dst_type)
    if target == tl.bfloat16 and source != tl.bfloat16:
        return Handle(to_bits(src.data.astype(np.float32)), tl.bfloat16)
    return original["cast_impl"](self, src, dst_type)


def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
        return cast_impl(self, src, dst_type)
    return original["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
    if _is_bfloat16(left) and op in _ARITHMETIC:
        raise TypeError("arithmetic on bfloat16 in the interpreter: the kernel is to convert to float32 first")
    return original["binary_op"](self, left, right, op)


def patch_tensor(tensor: Any, scope: Any) -> None:
    original["_patch_lang_tensor"](tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


#: The modules, by their globals, whose language is patched while a kernel runs.
_patched: set[int] = set()


def patch_lang(function: Any) -> Any:
    module = id(function.__globals__)
    if module in _patched:
        return interpreter._LangPatchScope()
    scope = original["_patch_lang"](function)
    _patched.add(module)
    restore = scope.restore

    def restore_all() -> None:
        # The kernel's own; device functions leave theirs behind.
        _patched.clear()
        restore()

    scope.restore = restore_all
    return scope


#: By shape: the shape of a type, its number of elements, how it is printed.
_shapes: dict[tuple[int, ...], tuple[Any, int, str]] = {}
#: By the identity of a type's shape, which is kept: that, and a tensor's shape and number of elements.
_tensors: dict[int, tuple[Any, Any, Any]] = {}
_dtypes: dict[str, np.dtype] = {}


def block_type(self: Any, element_ty: Any, shape: Any) -> None:
    key = tuple(n.value if isinstance(n, tl.constexpr) else n for n in shape)
    if key not in _shapes:
        original["block_type"](self, element_ty, shape)
        _shapes[key] = self.shape, self.numel, str(self.shape)
    self.shape, self.numel, text = _shapes[key]
    self.element_ty, self.name, self.sizes = element_ty, f"<{text}, {element_ty}>", key


def tensor(self: Any, handle: Any, type: Any) -> None:
    shape = type.shape if type.is_block() else None
    if id(shape) not in _tensors:
        original["tensor"](self, handle, type)
        _tensors[id(shape)] = shape, self.shape, self.numel
    _, self.shape, self.numel = _tensors[id(shape)]
    self.handle, self.type, self.dtype = handle, type, type.scalar


def get_np_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.scalar
    if scalar.name not in _dtypes:
        _dtypes[scalar.name] = original["_get_np_dtype"](scalar)
    return _dtypes[scalar.name]


def sanitize_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    """Raises where a sum, difference or product of integers overflows, except of unsigned ones, which may."""
    scalar = left.type.scalar
    if scalar.int_bitwidth >= 64 or scalar.is_int_unsigned():
        return
    wide = (x.handle.data.astype(np.int64) for x in (left, right))
    exact = _INTEGERS[operation.__name__](*wide)
    if exact.max() > scalar.get_int_max_value() or exact.min() < scalar.get_int_min_value():
        raise OverflowError(f"int{scalar.int_bitwidth} overflows in {operation.__name__}")


#: By pairs of shapes, () for a number: the shape of both together.
_together: dict[tuple[tuple[int, ...], ...], tuple[int, ...]] = {}


def broadcast_impl_value(self: Any, left: Any, right: Any) -> Any:
    pair = tuple(x.type.sizes if x.type.is_block() else () for x in (left, right))
    if pair not in _together:
        both = original["broadcast_impl_value"](self, left, right)
        _together[pair] = both[0].type.sizes if any(pair) else ()
        return both
    wanted = _together[pair]
    return _spread(self, left, pair[0], wanted), _spread(self, right, pair[1], wanted)


def _spread(self: Any, x: Any, sizes: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
    if sizes == wanted:
        return x
    handle = x.handle
    data = np.broadcast_to(handle.data.reshape((1,) * (len(wanted) - len(sizes)) + sizes), wanted)
    return self.tensor(Handle(data, handle.dtype.scalar), tl.block_type(x.type.scalar, wanted))


def apply() -> None:
    """Mends the interpreter of this process; before the first launch."""
    Builder.create_dot, Builder.cast_impl, Builder.binary_op = create_dot, cast_impl, binary_op
    Builder.create_fp_to_fp = create_fp_to_fp
    if not hasattr(Builder, "get_bf16"):
        Builder.get_bf16 = lambda self, value: Handle(to_bits(np.array([value], np.float32)), tl.bfloat16)
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang, get_np_dtype
    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    TritonSemantic.binary_op_sanitize_overflow_impl = sanitize_overflow
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
