"""Gated experts in float32 as one function compiled by Numba, for the few rows that each of them gets at decode.

There a call of BLAS costs more in being made than in multiplying, and so do the small operations around it. Importing
this module needs numba, and compiles what is not on disk yet.
"""

import numba
import numpy as np

from .arithmetic import OPTIONS, exp, kept_on_disk

_ZERO, _ONE = np.float32(0), np.float32(1)
# Up to so many rows an expert, on average, its products are not BLAS's.
_FEW_ROWS = 8


@numba.njit(**OPTIONS)
def _one(x, matrix, out):
    for o in range(len(matrix)):
        row, product = matrix[o], _ZERO
        for h in range(len(row)):
            product += x[h] * row[h]
        out[o] = product


@numba.njit(**OPTIONS)
def _two(x, y, matrix, out_x, out_y):
    for o in range(len(matrix)):
        row, product_x, product_y = matrix[o], _ZERO, _ZERO
        for h in range(len(row)):
            product_x += x[h] * row[h]
            product_y += y[h] * row[h]
        out_x[o], out_y[o] = product_x, product_y


@numba.njit(**OPTIONS)
def _four(x, y, z, w, matrix, out_x, out_y, out_z, out_w):
    for o in range(len(matrix)):
        row, product_x, product_y, product_z, product_w = matrix[o], _ZERO, _ZERO, _ZERO, _ZERO
        for h in range(len(row)):
            value = row[h]
            product_x += x[h] * value
            product_y += y[h] * value
            product_z += z[h] * value
            product_w += w[h] * value
        out_x[o], out_y[o], out_z[o], out_w[o] = product_x, product_y, product_z, product_w


@numba.njit(**OPTIONS)
def _multiply(x, rows, matrix, out):
    """`out` `(rows, outputs)` of x `(rows, inputs)` and a matrix `(outputs, inputs)`, which is read once for four rows."""
    at = 0
    while at < rows:
        if rows - at >= 4:
            _four(x[at], x[at + 1], x[at + 2], x[at + 3], matrix, out[at], out[at + 1], out[at + 2], out[at + 3])
            at += 4
        elif rows - at >= 2:
            _two(x[at], x[at + 1], matrix, out[at], out[at + 1])
            at += 2
        else:
            _one(x[at], matrix, out[at])
            at += 1


@numba.njit(**OPTIONS)
def _gate(rows, both, inner):
    """silu of the first half of each row times its second half."""
    width = inner.shape[1]
    for i in range(rows):
        row, into = both[i], inner[i]
        for c in range(width):
            into[c] = row[c] / (_ONE + exp(-row[c])) * row[width + c]


@numba.njit(**OPTIONS)
def _by_expert(indices, weights, experts):
    """Where each expert's assignments begin `(experts + 1,)` in a list of all that are not left out."""
    starts = np.zeros(experts + 1, np.int64)
    for t in range(len(indices)):
        for k in range(indices.shape[1]):
            if weights[t, k] != _ZERO:
                starts[indices[t, k] + 1] += 1
    for e in range(experts):
        starts[e + 1] += starts[e]
    order, ends = np.empty(starts[experts], np.int64), np.empty(experts, np.int64)
    for e in range(experts):
        ends[e] = starts[e]
    for t in range(len(indices)):
        for k in range(indices.shape[1]):
            if weights[t, k] != _ZERO:
                e = indices[t, k]
                order[ends[e]] = t * indices.shape[1] + k
                ends[e] += 1
    return starts, order


def _run(hidden, indices, weights, gate_up, down, out):
    """The experts' output `(T, hidden)` into `out`; assignments whose weight is 0 are not run.

    Args as of an experts module of transformers: hidden `(T, hidden)`, indices and weights `(T, top_k)`, gate_up
    `(experts, 2 · inner, hidden)`, down `(experts, hidden, inner)`. Returns whether it ran them: not where the experts get
    many rows each.
    """
    top_k, size, inner = indices.shape[1], hidden.shape[1], down.shape[2]
    starts, order = _by_expert(indices, weights, len(down))
    most, used = 0, 0
    for e in range(len(down)):
        rows = starts[e + 1] - starts[e]
        most = rows if rows > most else most
        used += rows > 0
    if len(order) > _FEW_ROWS * used:
        return False
    x, both = np.empty((most, size), np.float32), np.empty((most, 2 * inner), np.float32)
    between, y = np.empty((most, inner), np.float32), np.empty((most, size), np.float32)
    for t in range(len(out)):
        for h in range(size):
            out[t, h] = _ZERO
    for e in range(len(down)):
        begin, rows = starts[e], starts[e + 1] - starts[e]
        if not rows:
            continue
        for i in range(rows):
            row, into = hidden[order[begin + i] // top_k], x[i]
            for h in range(size):
                into[h] = row[h]
        _multiply(x, rows, gate_up[e], both)
        _gate(rows, both, between)
        _multiply(between, rows, down[e], y)
        for i in range(rows):
            t, k = order[begin + i] // top_k, order[begin + i] % top_k
            into, weight, answer = out[t], weights[t, k], y[i]
            for h in range(size):
                into[h] += weight * answer[h]
    return True


run_experts = kept_on_disk(
    _run,
    "boolean(float32[:,::1], int64[:,::1], float32[:,::1], float32[:,:,::1], float32[:,:,::1], float32[:,::1])",
)
