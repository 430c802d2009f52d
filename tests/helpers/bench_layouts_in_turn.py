"""Two measurements in one process, which pays for imports once: `python -m tests.helpers.bench_layouts_in_turn`.

In the second the formulas forget the loss that replicas sum.
"""

from __future__ import annotations

import sys

from gptscale.bench import compare_layouts
from gptscale.bench.contender import Contender
from gptscale.cli.main import main
from gptscale.plan.collectives import Payload

honest = compare_layouts.expected


def forgetful(contender: Contender) -> list[Payload]:
    return [
        {key: count - (4 if key == ("all-reduce", 2) else 0) for key, count in p.items()} for p in honest(contender)
    ]


if __name__ == "__main__":
    command = ["bench", "layouts", *sys.argv[1:]]
    print("honest:", main(command), flush=True)
    compare_layouts.expected = forgetful
    sys.exit(main([*command, "bench.contenders=[zero0]"]))
