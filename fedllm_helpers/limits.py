"""Numbers given to a call: one line for those that are none, or out of bounds."""

import math
from numbers import Integral, Real
from typing import Any


def whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError with one line unless a value is a whole number from ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}={value!r:.60}: allowed are whole numbers from {least}")


def number(name: str, value: Any, above: bool = True) -> None:
    """Raise ValueError with one line unless a value is a finite number above 0; with ``above=False``, from 0."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf
    if not fits or (above and value == 0):
        raise ValueError(f"{name}={value!r:.60}: allowed are numbers {'above' if above else 'from'} 0")
