"""A rank that is in a real collective when its peer fails: rank 1 raises, the others report as training ranks do."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from gptscale.runtime.logs import exit_code_of, report_failure
from gptscale.runtime.process import find_process
from gptscale.runtime.watch import die_with_launcher


def main() -> int:
    die_with_launcher()
    info = find_process(os.environ)
    try:
        import torch
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        ones = torch.ones(1000)
        dist.all_reduce(ones)
        if info.rank == 1:
            raise ArithmeticError("rank 1 cannot go on")
        dist.all_reduce(ones)
    except Exception as error:
        report_failure(error, info.rank)
        os._exit(exit_code_of(error, info.launcher))
    return 0


if __name__ == "__main__":
    sys.exit(main())
