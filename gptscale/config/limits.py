"""What every rule says of a number that is out of its range. Pure, no torch."""

from __future__ import annotations

import math

from gptscale.runtime.errors import UserError


def at_least(key: str, value: float, least: int) -> None:
    """Raises UserError, also where it is infinite or no number."""
    if not least <= value < math.inf:
        what = f"is below {least}" if value < least else "is no finite number"
        raise UserError(f"{key}={value} {what}\nset {key}={least} or more")


def above_zero(key: str, value: float, example: str) -> None:
    """Raises UserError, also where it is infinite or no number."""
    if not 0 < value < math.inf:
        what = "must be above 0" if value <= 0 else "is no finite number"
        raise UserError(f"{key}={value} {what}\nset it, e.g. {key}={example}")


def nearest_divisor(number: int, wanted: int) -> int:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
