"""Triton's numpy interpreter without torch: kernels run on the CPU, for tests.

The interpreter takes torch tensors; `_Buffer` is the part of their interface that it uses.
Private Triton API is used here only.
"""

import collections
import contextlib
import functools
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np


def interpret(
    kernel: Any,
    inputs: Sequence[jax.Array | None],
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    static: dict[str, Any],
) -> list[jax.Array]:
    """Run `kernel` over `grid` with pointers to `inputs` and then to the arrays of `out`.

    Outputs start as not-a-number, or -1 where integer: what a kernel leaves out shows. An input
    that is None reaches the kernel as None.
    """

    def run(*arrays):
        global _running
        arrays = [None if a is None else np.array(a) for a in arrays]
        results = [np.full(s.shape, _poison(s.dtype), s.dtype) for s in out]
        pointers = [None if a is None else _Buffer(a) for a in (*arrays, *results)]
        with _ONE_AT_A_TIME, _interpreting():
            _running = kernel.fn.__name__
            _interpreted(kernel.fn).run(*pointers, grid=grid, warmup=False, **static)
        return results

    return list(jax.pure_callback(run, list(out), *inputs, vmap_method="sequential"))


def count_products(function, *args, **kwargs) -> tuple[Any, dict[str, int]]:
    """(function(...), how many `tl.dot` each kernel in it did, by its name): blocks visited."""
    _products.clear()
    return jax.block_until_ready(function(*args, **kwargs)), dict(_products)


_products: collections.Counter[str] = collections.Counter()
_running = ""
# The interpreter's state is global, and several devices may call it at once.
_ONE_AT_A_TIME = threading.Lock()


def _poison(dtype) -> float | int:
    return -1 if np.issubdtype(dtype, np.integer) else float("nan")


@contextlib.contextmanager
def _interpreting() -> Iterator[None]:
    """`triton.jit` functions called inside, Triton's own among them, are interpreted.

    Leaves `triton.language` as it was: the interpreter itself forgets to, for nested functions.
    """
    import triton.language as tl
    from triton.runtime import interpreter, jit

    scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        with (
            mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
            mock.patch.object(
                jit.JITFunction,
                "__call__",
                lambda self, *args, **kwargs: _interpreted(self.fn)(*args, **kwargs),
            ),
        ):
            yield
    finally:
        scope.restore()


@functools.cache
def _interpreted(function: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A product as the tensor core does it: inputs as they are, sums in fp32.

    Triton's own keeps bfloat16 as its bits, and multiplies those.
    """
    from triton.runtime.interpreter import TensorHandle

    _products[_running] += 1
    product = np.matmul(_as_fp32(a), _as_fp32(b), dtype=np.float32)
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _as_fp32(handle) -> np.ndarray:
    data = handle.data
    if data.dtype == np.uint16:
        data = data.view(ml_dtypes.bfloat16)
    return data.astype(np.float32)


_TRITON_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "int32": "i32",
    "int64": "i64",
}


class _Buffer:
    """A numpy array that stands in for a torch tensor on the CPU."""

    def __init__(self, array: np.ndarray):
        assert array.flags.c_contiguous
        self.array = array
        self.dtype = _TRITON_DTYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Buffer":
        return self

    def cpu(self) -> "_Buffer":
        return self

    def new_empty(self, *_, **__) -> "_Buffer":
        return _Buffer(self.array)

    def set_(self, storage: "_Buffer", *_) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    def copy_(self, _) -> None:
        """Nothing to copy back: host and device are the same array."""
