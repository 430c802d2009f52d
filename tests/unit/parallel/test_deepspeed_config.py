from __future__ import annotations

import json

import pytest

from gptscale.parallel.deepspeed_config import zero_config
from gptscale.topology import BatchSplit


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("data", [1, 8])
def test_the_config_is_plain_json_and_leaves_nothing_to_defaults_that_surprise(stage: int, data: int) -> None:
    config = zero_config(stage, BatchSplit(data=data, per_rank=8, micro_batch=2), data, 0.7, 1_000_000)
    assert json.loads(json.dumps(config)) == config
    assert config["zero_optimization"]["stage"] == stage
    assert config["gradient_clipping"] == (0.7 if stage else 0.0)
    assert "train_batch_size" not in config
    assert config["zero_optimization"]["reduce_bucket_size"] == 1_000_000
    assert not config["zero_optimization"]["round_robin_gradients"]
