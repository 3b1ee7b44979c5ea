"""FLOPs and bytes of the grouped products, from shapes alone.

M counts all rows, also those beyond the groups: how many those are is known on the GPU only.
"""

from collections.abc import Sequence


def flops(M: int, pairs: Sequence[tuple[int, int]]) -> int:
    """FLOPs of products of M rows with weights [K, N] each, for (K, N) in `pairs`.

    The gradient of the rows (M x N by N x K) and that of the weights (K x M by M x N) take as many.
    """
    return sum(2 * M * K * N for K, N in pairs)


def rows_bytes(M: int, E: int, depths: Sequence[int], N: int, itemsize: int) -> int:
    """Least bytes of the sum of products [M, K] by [E, K, N] for K in `depths`: each array once.

    LoRA's second product in a kernel of its own would write, read and add [M, N]: 3 M N elements
    more.
    """
    return (M * N + sum((M + E * N) * K for K in depths)) * itemsize


def weights_bytes(M: int, E: int, K: int, N: int, itemsize: int, out_itemsize: int) -> int:
    """Least bytes of the weights' gradient [E, K, N] of rows [M, K] and [M, N]."""
    return M * (K + N) * itemsize + E * K * N * out_itemsize


def swiglu_bytes(M: int, E: int, K: int, N: int, itemsize: int, *, residuals: bool) -> int:
    """Least bytes of a forward `grouped_swiglu`: rows once, both weights, h, and with `residuals`
    the two products.

    Apart, two products and an elementwise pass would read the rows twice and the products once
    more: M K + 2 M N elements more than with residuals, M K + 4 M N more than without. For M
    131072, K 2048, N 768 in bf16 that is 0.9 and 1.3 GB of 2.9.
    """
    rows, weights, products = M * K, 2 * E * K * N, (3 if residuals else 1) * M * N
    return (rows + weights + products) * itemsize
