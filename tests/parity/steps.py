"""What a step does beside learning, on one layout: waits, skips, scales, measures noise. Runs inside a rank."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from gptscale.checkpoint.restore import restore_from
from gptscale.checkpoint.trained import COMPUTE_TYPES
from gptscale.checkpoint.write import save_checkpoint
from gptscale.config.schema import OptimizerConfig, PrecisionConfig, TrainRoot
from gptscale.flow import StepResult
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.parallel.engine import Engine, build_engine
from gptscale.parallel.loss_scale import DynamicScale
from gptscale.parallel.spread import spread
from gptscale.topology import split_batch
from gptscale.train.optimizer import OPTIMIZERS, build_optimizer, parameter_groups
from tests.helpers.syncs import counting
from tests.parity.cells import (
    CELLS,
    GLOBAL_BATCH,
    LENGTH,
    VOCABULARY,
    Layout,
    batches,
    gathered,
    join,
    poison,
    settings,
)

CELL = next(cell for cell in CELLS if cell.name == "gpt3-tied")
FP16 = PrecisionConfig(compute="fp16", loss_scale=2.0**21, loss_scale_window=3)
STEPS, SAVED, POISONED = 10, 6, 4


@OPTIMIZERS.register("unfused")
def unfused(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer as a user might bring one: not fused, so that it cannot be told what to divide by or to skip."""
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    return torch.optim.SGD([{**group, "state_kinds": ()} for group in groups], config.learning_rate, foreach=True)


class Bench:
    """Builds engines on the ranks of this process group."""

    def __init__(self, layout: Layout) -> None:
        self.ranks = join(layout)
        self.settings = settings(CELL, layout, 2)
        self.measures_noise = layout.sequence == layout.pipeline == 1
        self.split = split_batch(GLOBAL_BATCH, 2, self.ranks.topology.data)

    def build(self, root: TrainRoot, seed: int = 0) -> tuple[GPT, Engine]:
        model = GPT(root.model, VOCABULARY, LENGTH, COMPUTE_TYPES[root.precision.compute])
        initialise(model, seed)
        cut = spread(model, self.ranks, root.parallel, seed)
        return model, build_engine(model, cut, build_optimizer(model, root.optimizer), root, self.split, self.ranks)

    def step(self, engine: Engine, number: int, noise: bool = False) -> StepResult:
        return engine.train_step(batches(number, CELL, self.split, self.ranks.at.data), CELL.learning_rate, noise)


def record_steps(layout: Layout, folder: str, elsewhere: str | None, full: bool) -> None:
    """Leaves `steps-RANK.json` in the working directory; `elsewhere` is the folder of the plain engine's record."""
    bench = Bench(layout)
    fused = replace(bench.settings, precision=PrecisionConfig())
    slow = replace(fused, optimizer=replace(fused.optimizer, name="unfused"))
    found: dict[str, Any] = {"fused": waits_and_skips(bench, fused)}
    found["noise"] = noise(bench, fused) if bench.measures_noise else None
    if full:
        found["unfused"] = waits_and_skips(bench, slow)
    if layout.engine == "deepspeed":
        found["rules"] = same_rule()
    found["fp16"] = scaled(bench, replace(fused, precision=FP16), Path(folder), elsewhere)
    Path(f"steps-{bench.ranks.rank}.json").write_text(json.dumps(found))
    bench.ranks.close()


def same_rule() -> int:
    """How often DeepSpeed's scaler and ours were compared and equal, over random sequences of overflows."""
    from gptscale.parallel.on_deepspeed import deepspeed_scale

    random, equal = Random(0), 0
    for _ in range(200):
        config = PrecisionConfig(
            loss_scale=2.0 ** random.randrange(8),
            loss_scale_window=random.randrange(1, 8),
            loss_scale_hysteresis=random.randrange(1, 5),
        )
        ours, theirs, chance = DynamicScale.of(config), deepspeed_scale(config), random.random()
        for _ in range(60):
            overflow = random.random() < chance
            ours.update_scale(overflow)
            theirs.update_scale(overflow)
            for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
                assert getattr(ours, name) == getattr(theirs, name), (config, name)
            equal += 1
    return equal


def waits_and_skips(bench: Bench, root: TrainRoot) -> dict[str, Any]:
    model, engine = bench.build(root)
    bench.step(engine, 0)
    with counting() as counts:
        result = bench.step(engine, 1)
    before, updates = state(engine), engine.updates()
    with poison(model), counting() as skipping:
        skipped = bench.step(engine, 2)
    after = state(engine)
    assert set(before) == set(after)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    again = bench.step(engine, 3)
    return {
        "waits": dict(counts.places),
        "waits_of_a_skip": dict(skipping.places),
        "changed_by_a_skip": changed,
        "updates": [updates, engine.updates()],
        "norms": [float(result.grad_norm), float(skipped.grad_norm), float(again.grad_norm)],
        "seconds": [result.forward_backward_s, result.update_s],
    }


def noise(bench: Bench, root: TrainRoot) -> list[tuple[float, ...]]:
    _, engine = bench.build(root)
    results = [bench.step(engine, number, noise=True) for number in range(3)]
    assert bench.step(engine, 3).noise_signal is None
    return [noise_of(result) for result in results]


def scaled(bench: Bench, root: TrainRoot, folder: Path, elsewhere: str | None) -> dict[str, Any]:
    """A run in fp16 whose scale has to fall at first, the same resumed, and one that goes on from another layout's."""
    model, engine = bench.build(root)
    first = run(bench, model, engine, 0, SAVED)
    save_checkpoint(
        folder,
        SAVED,
        engine.pieces(),
        state={"updates": engine.updates(), "scaling": engine.loss_scaling()},
        layout={},
        comm=bench.ranks,
        keep=2,
        report=print,
    )
    rest = run(bench, model, engine, SAVED, STEPS)
    with counting() as counts:
        bench.step(engine, STEPS)
    found: dict[str, Any] = {"steps": first + rest, "rest": rest, "updates": engine.updates()}
    found |= {"waits": dict(counts.places), "end": engine.loss_scaling()}
    for name, source in (("resumed", folder), ("moved", None if elsewhere is None else Path(elsewhere))):
        if source is not None:
            model, engine = bench.build(root, seed=17)
            saved = restore_from(source / f"step-{SAVED:08d}", engine.pieces(), bench.ranks, print).state
            engine.loaded(saved["updates"], saved["scaling"])
            assert engine.loss_scaling() == saved["scaling"]
            found[name] = run(bench, model, engine, SAVED, STEPS)
    return found


def run(bench: Bench, model: GPT, engine: Engine, start: int, end: int) -> list[tuple[float, ...]]:
    """(loss, norm, loss scale, signal, trace) of every step."""
    made = []
    for number in range(start, end):
        if number == POISONED:
            with poison(model):
                result = bench.step(engine, number, bench.measures_noise)
        else:
            result = bench.step(engine, number, bench.measures_noise)
        assert result.loss_scale is not None
        made.append((float(result.loss), float(result.grad_norm), result.loss_scale, *noise_of(result)))
    return made


def noise_of(result: StepResult) -> tuple[float, ...]:
    """Signal and trace, where they were asked for."""
    if result.noise_signal is None or result.noise_trace is None:
        return ()
    return float(result.noise_signal), float(result.noise_trace)


def state(engine: Engine) -> dict[str, Any]:
    kinds = {piece.kind for piece in engine.pieces()}
    return {f"{kind}:{name}": value for kind in kinds for name, value in gathered(engine, kind).items()}


def wait_for_nothing(layout: Layout) -> None:
    """On a CUDA device: steps in fp32 and bf16 in which torch raises where anything waits for the device."""
    bench = Bench(layout)
    for compute in ("fp32", "bf16"):
        root = replace(bench.settings, precision=PrecisionConfig(compute=compute))  # type: ignore[arg-type]
        _, made = bench.build(root)
        for number in range(2):
            bench.step(made, number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = bench.step(made, 2, noise=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert result.forward_backward_s is not None
        assert result.update_s is not None
        assert result.forward_backward_s > result.update_s > 0
        assert np.isfinite(float(result.grad_norm))
    bench.ranks.close()
