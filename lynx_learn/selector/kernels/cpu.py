"""The compiled functions behind `compiled.Compiled`: one decode batch's decision, in NumPy arrays.

All in one file: what Numba keeps on disk it compiles again when this file has changed, and does not look at others.
Importing this module needs numba.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import carray  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic, overload

from ...moe.kernels.arithmetic import OPTIONS, exp, kept_on_disk
from ..features import SMALLEST_WEIGHT, TOKEN_PARTS
from ..scorers import LOWEST_LOG_COST

_TOKEN_PARTS = len(TOKEN_PARTS)
_SMALLEST_WEIGHT, _LOWEST_LOG_COST = np.float32(SMALLEST_WEIGHT), np.float32(LOWEST_LOG_COST)
_ZERO, _ONE, _INF, _SMALLEST_SPREAD = np.float32(0), np.float32(1), np.float32(np.inf), np.float32(1e-6)

# Small functions: what Numba takes to compile one grows faster than its length.
_part = numba.njit(**OPTIONS)


class Arrays(NamedTuple):
    """One layer's scorer and surrogates as the compiled function reads them. W is the inner layer's width, padded.

    What `scorers.Folded` holds in its last column is apart, as `direct_`.
    """

    assignment: Any
    """(assignment parts, W)."""
    direct_assignment: Any
    token: Any
    """(token parts + P, W)."""
    direct_token: Any
    experts: Any
    """(experts, W)."""
    direct_experts: Any
    projection: Any
    """(P, hidden)."""
    outer: Any
    """(W,)."""
    thresholds: Any
    """By the number of active tokens."""
    down: Any
    """(rows, hidden), float32 or the bits of bfloat16; so are the next two."""
    up: Any
    constant: Any
    """(experts, hidden)."""
    starts: Any
    """(experts + 1,), where each expert's rows begin."""


def _wide(value: Any) -> Any:
    """A float32, from one or from the bits of a bfloat16."""


@overload(_wide)
def _overload_wide(value):
    if value == numba.types.float32:
        return lambda value: value
    return lambda value: np.int32(np.int32(value) << np.int32(16)).view(np.float32)


@intrinsic
def _pointer(typing_context, address):
    """An address as `carray` takes it."""

    def made(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return numba.types.voidptr(numba.types.int64), made


@_part
def _vector(address, size, dtype):
    return carray(_pointer(address), (size,), dtype)  # type: ignore[call-arg]


@_part
def _matrix(address, rows, columns, dtype):
    return carray(_pointer(address), (rows, columns), dtype)  # type: ignore[call-arg]


@_part
def _at_least(value, least):
    """The larger one; what is no number stays so."""
    return least if value < least else value


@_part
def _read_logits(x, highest, powers, parts):
    """The parts of a token that its logits `(experts,)` say, in the order of features.TOKEN_PARTS."""
    experts = np.float32(len(x))
    mean, squares = _ZERO, _ZERO
    for e in range(len(x)):
        mean += x[e]
    mean /= experts
    for e in range(len(x)):
        squares += (x[e] - mean) * (x[e] - mean)
    spread = _at_least(np.sqrt(squares / (experts - _ONE)), _SMALLEST_SPREAD)
    # The largest logit but top_k, whichever experts were chosen: a router's choice may go by more than its logits.
    last = len(highest) - 1
    for j in range(len(highest)):
        highest[j] = -_INF
    for e in range(len(x)):
        if x[e] > highest[last]:
            j = last
            while j > 0 and highest[j - 1] < x[e]:
                highest[j] = highest[j - 1]
                j -= 1
            highest[j] = x[e]
    partition_sum, weighted = _ZERO, _ZERO
    for e in range(len(x)):
        powers[e] = exp(x[e] - highest[0])
    for e in range(len(x)):
        partition_sum += powers[e]
        weighted += powers[e] * x[e]
    partition = highest[0] + np.log(partition_sum)
    parts[0], parts[1], parts[2], parts[3] = highest[0], mean / spread, highest[last], partition
    parts[4], parts[5] = partition - weighted / partition_sum, spread


@_part
def _read_weights(x, experts, w, share, parts):
    """The parts of a token that its experts and weights `(top_k,)` say; fills their shares, returns the largest weight."""
    weight_sum = _ZERO
    for k in range(len(w)):
        weight_sum += w[k]
    weight_sum = _at_least(weight_sum, _SMALLEST_WEIGHT)
    largest, lowest_share, largest_share, lowest_logit = -_INF, _INF, -_INF, _INF
    for k in range(len(w)):
        share[k], logit = w[k] / weight_sum, x[experts[k]]
        # Written so that what is no number is taken over.
        largest = largest if w[k] <= largest else w[k]
        lowest_share = lowest_share if share[k] >= lowest_share else share[k]
        largest_share = largest_share if share[k] <= largest_share else share[k]
        lowest_logit = lowest_logit if logit >= lowest_logit else logit
    parts[6], parts[7], parts[8] = lowest_share, largest_share, lowest_logit
    return largest


@_part
def _rank(w, k):
    """How many of the weights are larger than number k, as a share."""
    above = _ZERO
    for j in range(len(w)):
        above += _ONE if w[j] > w[k] else _ZERO
    return above / np.float32(len(w))


@_part
def _project(state, projection, parts):
    for p in range(len(projection)):
        into, product = projection[p], _ZERO
        for h in range(len(state)):
            product += state[h] * into[h]
        parts[_TOKEN_PARTS + p] = product


@_part
def _of_token(parts, token, direct, constant):
    """What a token gives to the inner layer, into `constant`; returns what adds straight to the log-cost."""
    straight = _ZERO
    for c in range(len(constant)):
        constant[c] = _ZERO
    for p in range(len(parts)):
        part, into = parts[p], token[p]
        straight += part * direct[p]
        for c in range(len(constant)):
            constant[c] += part * into[c]
    return straight


@_part
def _learned(constant, of_expert, of, outer, a0, a1, a2, a3, a4):
    """What the inner layer says of an assignment's log-cost."""
    learned = _ZERO
    for c in range(len(outer)):
        inner = constant[c] + of_expert[c] + a0 * of[0, c] + a1 * of[1, c] + a2 * of[2, c]
        inner += a3 * of[3, c] + a4 * of[4, c]
        learned += inner / (_ONE + exp(-inner)) * outer[c]
    return learned


@_part
def _add_costs(hidden, logits, indices, weights, standing, projected, own, keep_top1, total, used, first):
    """Each expert's cost into `total`, whether it is used, and whether it is some token's first; returns the tokens."""
    experts, top_k = logits.shape[1], indices.shape[1]
    parts = np.empty(_TOKEN_PARTS + len(own.projection), np.float32)
    constant, powers = np.empty(len(own.outer), np.float32), np.empty(experts, np.float32)
    share, highest = np.empty(top_k, np.float32), np.empty(min(top_k + 1, experts), np.float32)
    to, count = own.direct_assignment, 0
    for t in range(len(logits)):
        if standing[t] == _INF:
            for k in range(top_k):
                total[indices[t, k]] = _INF
                used[indices[t, k]] = True
        if standing[t] == _ZERO or standing[t] == _INF:
            continue
        count += 1
        x, w, chosen = logits[t], weights[t], indices[t]
        _read_logits(x, highest, powers, parts)
        largest = _read_weights(x, chosen, w, share, parts)
        if len(projected):
            for p in range(len(own.projection)):
                parts[_TOKEN_PARTS + p] = projected[t, p]
        else:
            _project(hidden[t], own.projection, parts)
        straight = _of_token(parts, own.token, own.direct_token, constant)
        for k in range(top_k):
            # Parts of the assignment, in the order of features.ASSIGNMENT_PARTS.
            e = chosen[k]
            a0, a1, a2, a3 = np.log(_at_least(w[k], _SMALLEST_WEIGHT)), share[k], _rank(w, k), x[e]
            a4 = a3 / parts[5]
            cost = straight + own.direct_experts[e] + a0 * to[0] + a1 * to[1] + a2 * to[2] + a3 * to[3] + a4 * to[4]
            cost += _learned(constant, own.experts[e], own.assignment, own.outer, a0, a1, a2, a3, a4)
            # A cost that is no number must stay one: it keeps its expert.
            total[e] += standing[t] * np.exp(_at_least(cost, _LOWEST_LOG_COST))
            used[e] = True
            if keep_top1 and w[k] == largest:
                first[e] = True
    return count


@_part
def _by_level(total, devices, prices):
    """As `prices.level_prices`, multiplied with `prices`."""
    experts, last = len(total), 0
    for e in range(experts):
        last = devices[e] if devices[e] > last else last
    count = np.float32(last + 1)
    level, together = np.zeros(experts, np.int64), np.zeros(experts, np.float32)
    for e in range(experts):
        for other in range(experts):
            if devices[other] == devices[e] and (total[other] > total[e] or (total[other] == total[e] and other < e)):
                level[e] += 1
        together[level[e]] += total[e]
    found = np.empty(experts, np.float32)
    for e in range(experts):
        found[e] = prices[e] * (count * total[e] / together[level[e]] if total[e] > _ZERO else _ONE)
    return found


@_part
def _choose(total, threshold, prices, first, kept):
    """Which experts stay, into `kept`; returns the one that stays in any case."""
    anchor = 0
    # The first of the largest totals, where what is no number is larger than any.
    for e in range(len(total)):
        if total[e] != total[e]:
            anchor = e
            break
        if total[e] > total[anchor]:
            anchor = e
    for e in range(len(total)):
        kept[e] = not total[e] < threshold * prices[e] or e == anchor or first[e]
    return anchor


@_part
def _rewrite(indices, weights, usable, anchor, new_indices, new_weights, answered, head, after):
    """The assignments to run, and those left out as a list for each expert; returns how many these are."""
    left_out, top_k = 0, indices.shape[1]
    for t in range(len(indices) - 1, -1, -1):
        for k in range(top_k - 1, -1, -1):
            e = indices[t, k]
            stays = usable[e]
            new_indices[t, k] = e if stays else anchor
            new_weights[t, k] = weights[t, k] if stays else _ZERO
            answered[t, k] = not stays
            if answered[t, k]:
                left_out += 1
                after[t * top_k + k] = head[e]
                head[e] = t * top_k + k
    return left_out


@_part
def _answer_one(x, weight, down, up, constant, codes, out):
    """Add one expert's surrogate of one hidden state to `out`."""
    size, rank = len(x), len(down)
    for r in range(rank):
        into, product = down[r], _ZERO
        for h in range(size):
            product += _wide(into[h]) * x[h]
        codes[r] = product * weight
    for h in range(size):
        out[h] += weight * _wide(constant[h])
    in_fours = rank - rank % 4
    for r in range(0, in_fours, 4):
        c0, c1, c2, c3 = codes[r], codes[r + 1], codes[r + 2], codes[r + 3]
        u0, u1, u2, u3 = up[r], up[r + 1], up[r + 2], up[r + 3]
        for h in range(size):
            out[h] += c0 * _wide(u0[h]) + c1 * _wide(u1[h]) + c2 * _wide(u2[h]) + c3 * _wide(u3[h])
    for r in range(in_fours, rank):
        code, row = codes[r], up[r]
        for h in range(size):
            out[h] += code * _wide(row[h])


@_part
def _decide(
    hidden,
    logits,
    indices,
    weights,
    standing,
    projected,
    own,
    keep_top1,
    prices,
    devices,
    new_indices,
    new_weights,
    answered,
    loads,
    addition,
):
    """One decode batch; fills what comes after `devices`, and returns how many assignments are left out.

    Arguments as in `Routing`, `Price` and `Decision`, for one batch; `devices` is empty where all experts lie on one.
    `standing` is `(T,)`, float32: how many times a token's costs count, 0 where it does not run, infinite where it keeps
    all its experts and is not counted. `projected` is `(T, P)`, or has no rows: then the hidden states are projected here.
    """
    experts, top_k, rows = logits.shape[1], indices.shape[1], len(own.down)
    total, used, first = np.zeros(experts, np.float32), np.zeros(experts, np.bool_), np.zeros(experts, np.bool_)
    count = _add_costs(hidden, logits, indices, weights, standing, projected, own, keep_top1, total, used, first)
    kept = loads[1]
    if len(devices):
        prices = _by_level(total, devices, prices)
    anchor = _choose(total, own.thresholds[min(count, len(own.thresholds) - 1)], prices, first, kept)
    # Each surrogate is read once for all that it answers.
    head, after = np.empty(experts, np.int64), np.empty(indices.shape[0] * top_k, np.int64)
    # Tokens that are not active run on what the others load; where none is active, all run.
    nobody = True
    for e in range(experts):
        nobody = nobody and not used[e]
    usable = np.empty(experts, np.bool_)
    for e in range(experts):
        head[e], usable[e] = -1, kept[e] and (used[e] or nobody)
    left_out = _rewrite(indices, weights, usable, anchor, new_indices, new_weights, answered, head, after)
    if left_out and rows:
        for t in range(len(addition)):
            for h in range(addition.shape[1]):
                addition[t, h] = _ZERO
        codes = np.empty(rows, np.float32)
        for e in range(experts):
            place = head[e]
            if place < 0:
                continue
            begin, end = own.starts[e], own.starts[e + 1]
            down, up = own.down[begin:end], own.up[begin:end]
            while place >= 0:
                t, weight = place // top_k, weights[place // top_k, place % top_k]
                _answer_one(hidden[t], weight, down, up, own.constant[e], codes, addition[t])
                place = after[place]
    for e in range(experts):
        loads[0, e] = used[e]
        loads[1, e] = kept[e] and used[e]
    return left_out


@kept_on_disk
def decide(
    table,
    like,
    tokens,
    top_k,
    hidden,
    logits,
    indices,
    weights,
    active,
    scale,
    projected,
    prices,
    devices,
    new_indices,
    new_weights,
    answered,
    loads,
    addition,
):
    """`_decide` for arrays that lie in memory without gaps, by their addresses; 0 where there is none.

    What Numba takes to look at an array from Python is more than what a small one takes to be read.

    Args:
        table: int64; experts, hidden size, W, P, rows of surrogates, token parts with P, assignment parts, thresholds,
            whether each token keeps its first expert; then the addresses of what `Arrays` holds.
        like: an array of the surrogates' type, to tell it.
        tokens, top_k: the batch's size.
        hidden, logits, indices, weights, active: as in `Routing`; float32, int64 and bool.
        scale: `(T,)`, float32; as in `ThresholdPolicy.decide`.
        projected: `(T, P)`.
        prices, devices: as in `Price`.
        new_indices, new_weights, answered, loads, addition: filled; as in `Decision`, loads `(2, experts)`.

    Returns:
        How many assignments are left out.
    """
    experts, size, inner, parts, rows = table[0], table[1], table[2], table[3], table[4]
    of_token, of_assignment, sizes, at = table[5], table[6], table[7], table[9:]
    own = Arrays(
        _matrix(at[0], of_assignment, inner, np.float32),
        _vector(at[1], of_assignment, np.float32),
        _matrix(at[2], of_token, inner, np.float32),
        _vector(at[3], of_token, np.float32),
        _matrix(at[4], experts, inner, np.float32),
        _vector(at[5], experts, np.float32),
        _matrix(at[6], parts, size, np.float32),
        _vector(at[7], inner, np.float32),
        _vector(at[8], sizes, np.float32),
        _matrix(at[9], rows, size, like.dtype),
        _matrix(at[10], rows, size, like.dtype),
        _matrix(at[11], experts, size, like.dtype),
        _vector(at[12], experts + 1, np.int64),
    )
    standing = np.empty(tokens, np.float32)
    runs, counts = _vector(active, tokens, np.int8), _vector(scale, tokens, np.float32)
    for t in range(tokens):
        standing[t] = _ZERO if not runs[t] else counts[t] if scale else _ONE
    ones = np.ones(0 if prices else experts, np.float32)
    return _decide(
        _matrix(hidden, tokens, size, np.float32),
        _matrix(logits, tokens, experts, np.float32),
        _matrix(indices, tokens, top_k, np.int64),
        _matrix(weights, tokens, top_k, np.float32),
        standing,
        _matrix(projected, tokens if projected else 0, parts, np.float32),
        own,
        table[8] != 0,
        _vector(prices, experts, np.float32) if prices else ones,
        _vector(devices, experts if devices else 0, np.int64),
        _matrix(new_indices, tokens, top_k, np.int64),
        _matrix(new_weights, tokens, top_k, np.float32),
        _matrix(answered, tokens, top_k, np.bool_),
        _matrix(loads, 2, experts, np.bool_),
        _matrix(addition, tokens if rows else 0, size, np.float32),
    )
