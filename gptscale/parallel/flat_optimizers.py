"""Puts our optimizers of ZeRO in the place of DeepSpeed's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed.runtime.engine as engine_module
from deepspeed.runtime.zero import stage3 as stage3_module
from deepspeed.runtime.zero.partition_parameters import Init

from gptscale.parallel.flat_zero import FlatZeroOptimizer
from gptscale.parallel.flat_zero3 import FlatZero3Optimizer, make_and_partition


@contextmanager
def flat_optimizers() -> Iterator[None]:
    """Within, `deepspeed.initialize` builds these classes in place of its own."""
    stock, stock3 = engine_module.DeepSpeedZeroOptimizer, stage3_module.DeepSpeedZeroOptimizer_Stage3
    supported = engine_module.is_zero_supported_optimizer
    engine_module.DeepSpeedZeroOptimizer = FlatZeroOptimizer
    stage3_module.DeepSpeedZeroOptimizer_Stage3 = FlatZero3Optimizer
    # The check imports every optimizer that DeepSpeed has, Muon's compiler included: 2.5 s of CPU at each start. Ours
    # are built by `gptscale.train.optimizer`, which knows what it builds.
    engine_module.is_zero_supported_optimizer = lambda optimizer: True
    stock_init, Init._zero_init_param = Init._zero_init_param, make_and_partition
    # Every rank has made the same weights (`gptscale.model.init`), or is about to.
    broadcast = engine_module.DeepSpeedEngine._broadcast_model
    engine_module.DeepSpeedEngine._broadcast_model = lambda engine: None
    try:
        yield
    finally:
        engine_module.DeepSpeedZeroOptimizer = stock
        stage3_module.DeepSpeedZeroOptimizer_Stage3 = stock3
        engine_module.is_zero_supported_optimizer = supported
        engine_module.DeepSpeedEngine._broadcast_model = broadcast
        Init._zero_init_param = stock_init
