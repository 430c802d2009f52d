"""Write what every experiment composes to now into tests/golden, for a look at the diff."""

from __future__ import annotations

import json
from pathlib import Path

from gptscale.config.build import plain
from gptscale.config.compose import compose, group_options
from gptscale.config.schema import TrainRoot


def agreed_experiments() -> list[str]:
    """Every experiment, but of the two families a few: `test_family` compares all of them with paper and rules."""
    few = {"gpt3-125m", "gpt3-175b", "modern-125m"}
    return [name for name in group_options("experiment") if name in few or not name.startswith(("gpt3-", "modern-"))]


if __name__ == "__main__":
    for experiment in agreed_experiments():
        settings = compose("train", TrainRoot, [f"experiment={experiment}"]).settings
        target = Path(__file__).parents[2] / "golden" / f"{experiment}.json"
        target.write_text(json.dumps(plain(settings), indent=1) + "\n")
