"""Products of few rows with each of several experts' matrices, in one function compiled by Numba.

With two or three rows an expert, a call of BLAS costs more in being made than in multiplying. Importing this module
needs numba, and compiles what is not on disk yet.
"""

from typing import Any

import numba
import numpy as np

# Sums may be taken in another order, but what is no number or infinite stays so.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
_ZERO = np.float32(0)


def kept_on_disk(function: Any, *signature: str) -> Any:
    """Compile, and keep the result beside the function's file or where Numba may write."""
    compile_: Any = numba.njit
    try:
        return compile_(*signature, cache=True, **OPTIONS)(function)
    except RuntimeError:  # no folder at all can be written to
        return compile_(*signature, **OPTIONS)(function)


@numba.njit(**OPTIONS)
def _one(x, matrix, out):
    for o in range(len(matrix)):
        row, product = matrix[o], _ZERO
        for h in range(len(row)):
            product += x[h] * row[h]
        out[o] = product


@numba.njit(**OPTIONS)
def _two(x, y, matrix, out_x, out_y):
    """Two rows at once, so that the matrix is read once for both."""
    for o in range(len(matrix)):
        row, product_x, product_y = matrix[o], _ZERO, _ZERO
        for h in range(len(row)):
            product_x += x[h] * row[h]
            product_y += y[h] * row[h]
        out_x[o], out_y[o] = product_x, product_y


def _multiply(x, rows, matrices, out):
    """`out` `(N, outputs)` from x `(N, inputs)` and matrices `(experts, outputs, inputs)`: first come rows[0] rows of
    the first expert, then those of the next."""
    at = 0
    for e in range(len(rows)):
        end = at + rows[e]
        while at + 1 < end:
            _two(x[at], x[at + 1], matrices[e], out[at], out[at + 1])
            at += 2
        if at < end:
            _one(x[at], matrices[e], out[at])
            at += 1


multiply = kept_on_disk(_multiply, "void(float32[:,::1], int64[::1], float32[:,:,::1], float32[:,::1])")
