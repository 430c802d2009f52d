"""What every rule says of a number that is out of its range. Pure, no torch."""

from __future__ import annotations

from gptscale.runtime.errors import UserError


def at_least(key: str, value: float, least: int) -> None:
    if value < least:
        raise UserError(f"{key}={value} is below {least}\nset {key}={least} or more")


def above_zero(key: str, value: float, example: str) -> None:
    if not value > 0:
        raise UserError(f"{key}={value} must be above 0\nset it, e.g. {key}={example}")


def nearest_divisor(number: int, wanted: int) -> int:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))
