"""One seed for every purpose, from the run's seed and the purpose's name."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2⁶⁴) that depends on every part, its order and its kind: derive_seed(seed, "order", epoch).

    The same on every machine, Python and release (BLAKE2b, not `hash`). Parts are written with kind and length, so that
    ("ab", "c") and ("a", "bc"), or 1 and "1", differ. Accepted as it is by torch.manual_seed and by numpy generators.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = (part if isinstance(part, str) else str(int(part))).encode()
        digest.update(b"%c%d:%b" % (b"s" if isinstance(part, str) else b"i", len(text), text))
    return int.from_bytes(digest.digest(), "little")
