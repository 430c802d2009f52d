"""`gptscale bench step`, from its contenders to a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from gptscale.bench.contender import EQUAL_LOSS, MATMUL, Contender, matmul_flops
from gptscale.bench.environment import describe_environment, load_average
from gptscale.bench.report import Report, step_flops
from gptscale.bench.rounds import CheckSent, Samples, check_equal_losses, measure, time_kernels
from gptscale.bench.summary import Peak, Row, matmul_peak, summarise
from gptscale.config.schema import BenchConfig


def bench_step(
    bench: BenchConfig,
    contenders: Sequence[Contender],
    command: str,
    port: Callable[[], int],
    say: Callable[[str], None],
    left_out: Mapping[str, str],
    together: int | None = None,
    check_sent: CheckSent | None = None,
    watched: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Report:
    """Measure these contenders, the first of them being the reference and the last matrix products.

    `left_out` says who takes no part, and why; `port` gives each a port where its ranks meet; `say` hears how far it
    is. So many as `together` says are alive at a time beside those two, which take part every time; None: all. As to
    `check_sent` and `watched`, see `gptscale.bench.rounds.measure`. Raises BenchError where no figure can be trusted,
    UserError where a contender refuses its settings.
    """
    common, *others, matmul = contenders
    load_at_start = load_average()
    attention = time_kernels(common, say)
    measured: dict[str, Samples] = {}
    rows: list[Row] = []
    peaks: list[Peak] = []
    worst_loss_difference = 0.0
    few = max(1, together or len(others))
    for start in range(0, max(1, len(others)), few):
        chosen = [common, *others[start : start + few], matmul]
        here = {contender.name: watched[contender.name] for contender in chosen if contender.name in watched}
        found = measure(chosen, attention.kernels, bench, port, say, check_sent, here)
        ready = found[common.name].ready
        peaks.append(matmul_peak(found[MATMUL], matmul_flops(ready.device.partition(":")[0]), bench.ranks))
        rows += [row for row in summarise(found, step_flops(common), peaks[-1]) if row.name not in measured]
        difference = check_equal_losses(found, EQUAL_LOSS[common.settings.precision.compute])
        worst_loss_difference = max(worst_loss_difference, difference)
        measured |= {name: samples for name, samples in found.items() if name not in measured}
    return Report(
        bench=bench,
        settings=common.settings,
        accumulation=common.split.accumulation,
        environment=describe_environment(
            command, bench.ranks, bench.threads, ready.device, ready.keeps_freed_memory, load_at_start
        ),
        rows=rows,
        peak=peaks[0],
        measured=measured,
        sections={contender.name: contender.section for contender in contenders},
        attention=attention.built,
        left_out=left_out,
        worst_loss_difference=worst_loss_difference,
    )
