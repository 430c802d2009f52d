"""Write what every experiment composes to now into tests/golden, for a look at the diff."""

from __future__ import annotations

import json
from pathlib import Path

from gptscale.config.build import plain
from gptscale.config.compose import compose, group_options
from gptscale.config.schema import TrainRoot

if __name__ == "__main__":
    for experiment in group_options("experiment"):
        settings = compose("train", TrainRoot, [f"experiment={experiment}"]).settings
        target = Path(__file__).parents[2] / "golden" / f"{experiment}.json"
        target.write_text(json.dumps(plain(settings), indent=1) + "\n")
