from __future__ import annotations

import json
from dataclasses import fields

import pytest

from gptscale.config.schema import (
    DeepSpeedCommsLogger,
    DeepSpeedConfig,
    DeepSpeedFlopsProfiler,
    DeepSpeedZeroConfig,
)
from gptscale.parallel.deepspeed_config import NEVER, zero_config
from gptscale.topology import BatchSplit

SPLIT = BatchSplit(data=1, per_rank=8, micro_batch=2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("data", [1, 8])
def test_the_config_is_plain_json_and_leaves_nothing_to_defaults_that_surprise(stage: int, data: int) -> None:
    split = BatchSplit(data=data, per_rank=8, micro_batch=2)
    config = zero_config(stage, split, data, 0.7, 1_000_000, DeepSpeedConfig())
    assert json.loads(json.dumps(config)) == config
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_clipping"] == (0.7 if stage else 0.0)
    assert "train_batch_size" not in config
    assert config["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    assert not config["zero_optimization"]["round_robin_gradients"]
    assert "comms_logger" not in config


def test_what_the_user_says_goes_before_what_is_derived() -> None:
    raw = DeepSpeedConfig(
        zero_optimization=DeepSpeedZeroConfig(reduce_bucket_size=7, stage3_param_persistence_threshold=0),
        comms_logger=DeepSpeedCommsLogger(enabled=True, verbose=True),
        steps_per_print=3,
    )
    config = zero_config(3, SPLIT, 2, 1.0, 1_000_000, raw)
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert config["zero_optimization"]["sub_group_size"] == NEVER
    assert config["comms_logger"] == {"enabled": True, "verbose": True, "prof_all": True, "debug": False}
    assert config["steps_per_print"] == 3


def test_deepspeed_knows_every_name() -> None:
    """It ignores names that it does not know, but for those within `zero_optimization`."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as Zero

    zero = set(Zero.model_fields) | {info.alias for info in Zero.model_fields.values()}
    top = {value for name, value in vars(constants).items() if isinstance(value, str) and name.isupper()}
    known = {
        DeepSpeedZeroConfig: zero,
        DeepSpeedCommsLogger: set(CommsLoggerConfig.model_fields),
        DeepSpeedFlopsProfiler: set(vars(DeepSpeedFlopsProfilerConfig({}))),
        DeepSpeedConfig: top | {"zero_optimization", "comms_logger", "flops_profiler"},
    }
    for group, names in known.items():
        assert {field.name for field in fields(group)} <= names
