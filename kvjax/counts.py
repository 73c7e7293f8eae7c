"""Settings that must be a whole number, a real one, or True or False."""

import math
import numbers
import operator
from typing import Any

import numpy as np


def whole(where: str, name: str, value: Any, *, least: int | None = None, mend: str = "") -> int:
    """`value` as an int. Raises ValueError, with `mend`, if it is not whole, below `least`, or beyond 32 bits."""
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise ValueError(f"{where}: {name}={value!r} must be a whole number. {mend}".rstrip())
    if least is not None and count < least:
        raise ValueError(f"{where}: {name}={count} must be at least {least}. {mend}".rstrip())
    most = 2**32 - 1 if name == "seed" else 2**31 - 1  # positions and counts are i32, seeds u32
    if count > most:
        raise ValueError(f"{where}: {name}={count} must be at most {most}, which is what 32 bits hold. {mend}".rstrip())
    return count


def real(
    where: str,
    name: str,
    value: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    mend: str = "",
) -> float:
    """`value` as a float. Raises ValueError, with `mend`, if it is no finite real number or not within the bounds."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    wanted = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    try:
        found = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf
    if (
        not math.isfinite(found)
        or (least is not None and found < least)
        or (above is not None and found <= above)
        or (most is not None and found > most)
        or (below is not None and found >= below)
    ):
        raise ValueError(f"{where}: {name}={value!r} must be a finite number {wanted}".rstrip() + f". {mend}".rstrip())
    return found


def flag(where: str, name: str, value: Any) -> bool:
    """`value` as a bool. Raises ValueError if it is anything else: words such as "no" would count as True."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{where}: {name}={value!r} must be True or False.")
    return bool(value)
