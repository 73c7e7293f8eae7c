"""What counts something must be a whole number."""

import operator
from typing import Any


def whole(where: str, name: str, value: Any, *, least: int | None = None, mend: str = "") -> int:
    """`value` as an int. Raises ValueError, with `mend`, if it is not whole, or below `least`."""
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{where}: {name}={value!r} must be a whole number. {mend}".rstrip()) from None
    if least is not None and count < least:
        raise ValueError(f"{where}: {name}={count} must be at least {least}. {mend}".rstrip())
    return count
