"""The attention kernels that a run with these settings would choose as it starts."""

from __future__ import annotations

import os

from gptscale.bench.contender import Contender
from gptscale.bench.turns import Ready
from gptscale.bench.workload import random_batches
from gptscale.parallel.ranks import Ranks
from gptscale.runtime.process import find_process
from gptscale.train.kernels import check_kernel, choose_kernels, described
from gptscale.train.setup import build_model


def choose(contender: Contender, keeps_freed_memory: bool) -> Ready:
    """Time them in this process. Raises UserError where the settings name one that cannot do this model."""
    settings = contender.settings
    ranks = Ranks(find_process(os.environ), deepspeed=False, timeout_s=settings.parallel.timeout_s)
    model = build_model(settings, settings.tokenizer.vocab_size)
    check_kernel(model, settings, ranks.device)
    starts_BT = random_batches(contender, 0, ranks.device)[0][0].starts_BT
    choice = choose_kernels(model, settings, starts_BT, {}, ranks)
    kernels: dict[str, str] = {kind: chosen.kernel for kind, chosen in choice.items()}
    return Ready(described(choice), str(ranks.device), keeps_freed_memory, kernels)
