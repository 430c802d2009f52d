"""How often engines wait for the device in a step."""

from __future__ import annotations

import torch

from tests.helpers.syncs import counting


def test_the_count_sees_every_way_of_asking() -> None:
    value, mask = torch.rand(()), torch.rand(3) > 2
    questions = (
        lambda: float(value),
        lambda: value.item(),
        lambda: bool(value > 0),
        lambda: 1 if torch.isfinite(value) else 0,
        lambda: torch.equal(value, value),
        lambda: value.tolist(),
        lambda: value.numpy(),
        lambda: value.cpu(),
        lambda: torch.rand(3)[mask],
        lambda: torch.rand(3).nonzero(),
        lambda: mask.any().item(),
    )
    for number, question in enumerate(questions):
        with counting() as counts:
            question()
        assert counts.total == 1, (number, counts.places)
    with counting() as counts:
        torch.where(torch.isfinite(value), value, 0).sqrt_()
        _ = int(torch.tensor(3))
    assert counts.total == 0
    with counting() as counts:
        float(value)
    (place,) = counts.places
    assert place.startswith("test_syncs.py:"), "who asks is named, not torch"
