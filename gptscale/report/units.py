"""Numbers as people read them."""

from __future__ import annotations

import math

_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def short(value: float, digits: int = 3) -> str:
    """Three significant digits and k, M, B or T: 1,234,567 is 1.23M."""
    if not math.isfinite(value):
        return "–"
    for limit, suffix in _LARGE:
        if abs(value) >= limit * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / limit, digits)}{suffix}"
    return _significant(value, digits)


def count(value: float) -> str:
    """All digits, in groups of three."""
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def fixed(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def percent(share: float) -> str:
    """A share of 1 in per cent: 12.3 %, 1.5 %, and "< 0.1 %" for what would be shown as nothing."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def a_token(text_bytes: int, tokens: int) -> str:
    """Bytes of text a token stands for."""
    return f"{text_bytes / tokens:.2f}" if tokens and text_bytes else "–"


def size(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    for limit, unit in _BYTES:
        if value >= limit:
            return f"{_significant(value / limit, 3)} {unit}"
    return f"{value:.0f} bytes"


def duration(seconds: float) -> str:
    """Two units: 3 h 12 min."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit_s, unit, next_s, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit_s:
            rest = whole % unit_s // next_s
            return f"{whole // unit_s} {unit}" + (f" {rest} {next_unit}" if rest else "")
    return f"{whole} s"


def flops(value: float) -> str:
    """With the prefix, before "FLOP" or "FLOP/s": 989 T."""
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= limit:
            return f"{_significant(value / limit, 3)} {prefix}"
    return f"{value:,.0f} "


def _significant(value: float, digits: int) -> str:
    """Without an exponent for what is near 1, and without zeros that say nothing."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -4 <= magnitude < 6:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    text = f"{value:.{max(0, digits - 1 - magnitude)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
