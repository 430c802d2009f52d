"""Which tokens may be drawn, how often, and by whose generator."""

from __future__ import annotations

import pytest
import torch

from gptscale.generate.sampler import Sampler, probabilities

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]))


def test_probabilities() -> None:
    def of(**settings: float) -> list[float]:
        kept = {"temperature": 1.0, **settings}
        return [round(p, 4) for p in probabilities(LOGITS, **kept)[0].tolist()]  # type: ignore[arg-type]

    assert of() == [0.1, 0.4, 0.05, 0.3, 0.15]
    assert of(temperature=0.5) == [round(p * p / 0.285, 4) for p in (0.1, 0.4, 0.05, 0.3, 0.15)]
    assert of(top_k=2) == [0.0, 0.5714, 0.0, 0.4286, 0.0]
    assert of(top_k=0) == of(top_k=5) == of(top_k=99) == of()
    assert of(top_p=0.6) == [0.0, 0.5714, 0.0, 0.4286, 0.0]
    assert of(top_p=0.75) == [0.0, 0.4706, 0.0, 0.3529, 0.1765]
    assert of(top_p=1e-9) == [0.0, 1.0, 0.0, 0.0, 0.0]
    # The nucleus is that of what top_k and temperature leave.
    assert of(top_k=2, top_p=0.5) == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_draws_follow_the_probabilities() -> None:
    sampler = Sampler([3], temperature=1.0, top_k=4)
    counts = torch.zeros(5)
    draws = 4_000
    for _ in range(draws):
        counts[sampler.sample(LOGITS, [0])[0]] += 1
    expected = probabilities(LOGITS, 1.0, top_k=4)[0] * draws
    assert counts[2] == 0
    used = expected > 0
    chi_squared = ((counts - expected)[used] ** 2 / expected[used]).sum()
    assert chi_squared < 16.3  # 3 degrees of freedom: one seed in a thousand is above


def test_rows_have_their_own_generators() -> None:
    wide = torch.zeros(3, 1000)
    together = Sampler([1, 2, 3], 1.0)
    drawn = [together.sample(wide, [0, 1, 2]) for _ in range(5)]
    alone = Sampler([2], 1.0)
    assert [row[1] for row in drawn] == [alone.sample(wide[:1], [0])[0] for _ in range(5)]
    # A row that drops out takes nothing with it.
    rest = Sampler([1, 2, 3], 1.0)
    assert [rest.sample(wide[:2], [0, 2]) for _ in range(5)] == [[row[0], row[2]] for row in drawn]
    assert len({tuple(row) for row in zip(*drawn, strict=True)}) == 3


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 2.0, "top_k": 1}])
def test_greedy(settings: dict[str, float]) -> None:
    sampler = Sampler([0, 1], **settings)  # type: ignore[arg-type]
    logits = torch.randn(2, 50)
    assert sampler.sample(logits, [0, 1]) == logits.argmax(-1).tolist()
