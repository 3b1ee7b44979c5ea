"""tokamax's Triton kernels on the CPU, in Triton's interpreter: nothing of theirs but the GPU is
replaced. What this needs of tokamax and jax-triton that is private stands here only.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

from jax.extend import backend
from jaxrl_kernels.interpreter import interpret

from jaxrl.ops.registry import Target

A6000 = Target("gpu", "NVIDIA RTX A6000", 86)  # where tokamax's products are all Triton's


class Ampere:
    platform, compute_capability, core_count, device_kind = "gpu", "8.6", 84, A6000.gpu


@contextlib.contextmanager
def interpreted_tokamax() -> Iterator[None]:
    """Grouped products of tokamax inside are those of an A6000, interpreted."""
    from tokamax._src.ops.ragged_dot import triton

    with (
        mock.patch.object(backend, "get_default_device", Ampere),
        mock.patch.object(triton.TritonRaggedDot, "supported_on", lambda self, device: True),
        mock.patch.object(triton.jt, "triton_call", _triton_call),
    ):
        yield


def _triton_call(*inputs, kernel, out_type, grid, name, num_warps, num_stages, **static):
    del name, num_warps, num_stages
    (out,) = interpret(kernel, inputs, [out_type], grid, static)
    return out
