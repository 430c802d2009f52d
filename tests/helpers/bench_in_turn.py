"""Three measurements in one process, which pays for torch's import once: `python -m tests.helpers.bench_in_turn`.

In the first one a contender trains with twice the learning rate. The second is on two ranks. The third takes minutes.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from gptscale.bench import contender
from gptscale.bench.contender import Contender
from gptscale.cli.main import main
from gptscale.config.schema import BenchRoot

honest_contenders = contender.build_contenders


def unequal_contenders(settings: BenchRoot) -> list[Contender]:
    contenders = honest_contenders(settings)
    faster = replace(settings.optimizer, learning_rate=2 * settings.optimizer.learning_rate)
    return [replace(c, settings=replace(c.settings, optimizer=faster)) if c.name == "plain" else c for c in contenders]


if __name__ == "__main__":
    command = ["bench", "step", *sys.argv[1:]]
    contender.build_contenders = unequal_contenders
    print("unequal:", main([*command, "bench.contenders=[plain]"]), flush=True)
    contender.build_contenders = honest_contenders
    print("two ranks:", main([*command, "bench.contenders=[zero2]", "bench.ranks=2", "bench.rounds=1"]), flush=True)
    sys.exit(main([*command, "bench.contenders=[plain]", "bench.rounds=2000"]))
