"""Vectorised losses compiled for a GPU. Needs Triton, which comes with torch where there is one."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports] - it is there where a GPU is
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

LARGEST = 32
"""Longest side of what counts as a small matrix."""

MATRICES = 8
"""Small products that one program of the kernel works out."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for fixed shapes, with a kernel of its own for batches of small matrix products.

    A short sequence's attention in many chains at once is millions of products of, say, 16 × 16 matrices, for which
    library calls take a third of all time.

    Args:
        function: of CUDA tensors.

    Returns:
        The same function.
    """
    return torch.compile(function, dynamic=False, options={"post_grad_custom_pre_pass": _SmallProducts()})


class _SmallProducts(CustomGraphPass):
    """Puts `small_bmm` where a graph has `bmm` of small matrices."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
            left, right = (argument.meta["val"] for argument in node.args)
            small = max(*left.shape[1:], *right.shape[1:]) <= LARGEST
            if small and left.dtype in {torch.float32, torch.bfloat16}:
                node.target = torch.ops.phasewatch.small_bmm.default

    def uuid(self) -> Any:
        """Of this pass, for the compiler's cache."""
        return hashlib.sha256(Path(__file__).read_bytes()).digest()


@torch.library.custom_op("phasewatch::small_bmm", mutates_args=())
def small_bmm(left: Tensor, right: Tensor) -> Tensor:
    """Products of small matrices, as `torch.bmm`.

    Args:
        left: shape (batch, m, k), each side at most 32.
        right: shape (batch, k, n).

    Returns:
        Shape (batch, m, n).
    """
    count, m, k = left.shape
    n = right.shape[2]
    out = left.new_empty(count, m, n)
    exact = left.dtype is torch.float32 and torch.get_float32_matmul_precision() == "highest"
    sides = [max(16, triton.next_power_of_2(side)) for side in (m, n, k)]
    launch: Any = _small_bmm
    launch[(triton.cdiv(count, MATRICES),)](
        left, right, out, count, m, n, k, *left.stride(), *right.stride(),
        "ieee" if exact else "tf32", MATRICES, *sides,
    )  # fmt: skip
    return out


@small_bmm.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[1], right.shape[2])


@triton.jit
def _small_bmm(  # noqa: ANN202
    left, right, out, count, m, n, k, left_0, left_1, left_2, right_0, right_1, right_2,  # noqa: ANN001
    PRECISION: tl.constexpr, MATRICES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64) * MATRICES + tl.arange(0, MATRICES)[:, None, None]
    row, column = tl.arange(0, M)[None, :, None], tl.arange(0, N)[None, None, :]
    inner_column, inner_row = tl.arange(0, K)[None, None, :], tl.arange(0, K)[None, :, None]
    here = batch < count
    a = tl.load(
        left + batch * left_0 + row * left_1 + inner_column * left_2,
        mask=here & (row < m) & (inner_column < k), other=0.0,
    )  # fmt: skip
    b = tl.load(
        right + batch * right_0 + inner_row * right_1 + column * right_2,
        mask=here & (inner_row < k) & (column < n), other=0.0,
    )  # fmt: skip
    product = tl.dot(a, b, input_precision=PRECISION)
    tl.store(
        out + batch * m * n + row * n + column,
        product.to(out.dtype.element_ty), mask=here & (row < m) & (column < n),
    )  # fmt: skip
