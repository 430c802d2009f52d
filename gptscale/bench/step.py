"""`gptscale bench step`, from its contenders to a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gptscale.bench.contender import EQUAL_LOSS, MATMUL, Contender, matmul_flops
from gptscale.bench.environment import describe_environment, load_average
from gptscale.bench.report import Report, step_flops
from gptscale.bench.rounds import check_equal_losses, measure, time_kernels
from gptscale.bench.summary import matmul_peak, summarise
from gptscale.config.schema import BenchConfig


def bench_step(
    bench: BenchConfig,
    contenders: Sequence[Contender],
    command: str,
    port: Callable[[], int],
    say: Callable[[str], None],
    left_out: Mapping[str, str],
) -> Report:
    """Measure these contenders, the first of them being the reference.

    `left_out` says who takes no part, and why; `port` gives each a port where its ranks meet; `say` hears how far it
    is. Raises BenchError where no figure can be trusted, UserError where a contender refuses its settings.
    """
    common = contenders[0]
    load_at_start = load_average()
    attention = time_kernels(common, say)
    measured = measure(contenders, attention.kernels, bench, port, say)
    ready = measured[common.name].ready
    peak = matmul_peak(measured[MATMUL], matmul_flops(ready.device.partition(":")[0]), bench.ranks)
    return Report(
        bench=bench,
        settings=common.settings,
        accumulation=common.split.accumulation,
        environment=describe_environment(
            command, bench.ranks, bench.threads, ready.device, ready.keeps_freed_memory, load_at_start
        ),
        rows=summarise(measured, step_flops(common), peak),
        peak=peak,
        measured=measured,
        sections={contender.name: contender.section for contender in contenders},
        attention=attention.built,
        left_out=left_out,
        worst_loss_difference=check_equal_losses(measured, EQUAL_LOSS[common.settings.precision.compute]),
    )
