"""What the functions that Numba compiles share. Importing this module needs numba."""

from contextlib import AbstractContextManager
from typing import Any

import numba
import numpy as np

from ...show.progress import step_if_slow

# Sums may be taken in another order, but what is no number or infinite stays so.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
# Of exp: 2^n · e^r with r at most ln(2) / 2 either way, by the polynomial of Cephes' expf (Moshier 1992).
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_LOW, _HIGH, _HALF, _ONE, _INF = np.float32(-87), np.float32(88), np.float32(0.5), np.float32(1), np.float32(np.inf)
_BIAS, _MANTISSA = np.int32(127), np.int32(23)


def compiling() -> AbstractContextManager[None]:
    """Around what loads or runs compiled functions first: says so where they have to be compiled."""
    return step_if_slow("compiling for this CPU, once")


# Loops are written out: of NumPy's functions and operators on arrays each takes tenths of seconds to be compiled.


def kept_on_disk(function: Any, *signature: str) -> Any:
    """Compile, and keep the result beside the function's file or where Numba may write.

    What is kept is compiled again when that file has changed; Numba does not look at the files that it imports.
    """
    compile_: Any = numba.njit
    try:
        return compile_(*signature, cache=True, **OPTIONS)(function)
    except RuntimeError:  # no folder at all can be written to
        return compile_(*signature, **OPTIONS)(function)


@numba.njit(**OPTIONS)
def exp(x):
    """e^x to a few units in the last place; unlike the library's it can be computed for several numbers at once."""
    low = _LOW if x < _LOW else x
    clamped = _HIGH if low > _HIGH else low
    n = np.float32(np.floor(clamped * _LOG2_E + _HALF))
    r = clamped - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    scale = np.int32((np.int32(n) + _BIAS) << _MANTISSA).view(np.float32)
    value = (p * r * r + r + _ONE) * scale
    return _INF if x > _HIGH else value
