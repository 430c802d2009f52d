"""The DeepSpeed config as a pure function of ours. Tested without processes.

Every key is written, because DeepSpeed's defaults surprise (clipping at 1.0 where omitted) and because it ignores
unknown top-level keys in silence.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gptscale.config.schema import DeepSpeedConfig
from gptscale.topology import BatchSplit

NEVER = 10**9
LARGEST_BUCKET = 200_000_000
"""Elements a communication bucket holds at most; more does not make a ring faster, and the buffer is memory."""


def pipeline_config(
    split: BatchSplit, replicas: int, clip_norm: float, parameters: int, raw: DeepSpeedConfig
) -> dict[str, Any]:
    """Config of ZeRO-1 within the stages of a pipeline, which exchange whole activations."""
    exchange = {"pipe_partitioned": False, "grad_partitioned": False, "activation_checkpoint_interval": 0}
    return zero_config(1, split, replicas, clip_norm, parameters, raw) | {"pipeline": exchange}


def zero_config(
    stage: int, split: BatchSplit, replicas: int, clip_norm: float, parameters: int, raw: DeepSpeedConfig
) -> dict[str, Any]:
    """Config of a ZeRO stage over an fp32 model with a client optimizer. `raw`: what the user says.

    `train_batch_size` is left out: DeepSpeed derives it. Stage 0 is clipped by our engine, which must also skip a step
    whose gradient is not finite; DeepSpeed's stage 0 applies it.
    """
    bucket = min(LARGEST_BUCKET, max(parameters, 1))
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": False,
        "overlap_comm": False,
        "round_robin_gradients": False,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": min(bucket, 50_000_000),
            "sub_group_size": NEVER,
            # One gather and one set of hooks a block, not a module.
            "leaf_module": {"classes": ["gptscale.model.gpt.Block"], "names": [], "name_suffixes": []},
            # Would replace F.linear, for the whole process, by one that keeps no gathered weight alive for backward.
            # `gptscale.model.linear` keeps none, and adds the bias without rounding in between.
            "memory_efficient_linear": False,
        }
        if replicas == 1:  # nothing to gather: keep every parameter where it is
            zero |= {"stage3_param_persistence_threshold": NEVER, "stage3_prefetch_bucket_size": 0}
    zero |= {key: value for key, value in asdict(raw.zero_optimization).items() if value is not None}
    return {
        "train_micro_batch_size_per_gpu": split.micro_batch,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": clip_norm if stage > 0 else 0.0,
        "steps_per_print": NEVER if raw.steps_per_print is None else raw.steps_per_print,
        "wall_clock_breakdown": raw.wall_clock_breakdown,
        "dump_state": raw.dump_state,
        "flops_profiler": asdict(raw.flops_profiler),
        "timers": {"throughput": {"enabled": False}},  # would wait for the device in every micro-batch
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        # The key alone, whatever it holds, has DeepSpeed look at every collective.
        **({"comms_logger": asdict(raw.comms_logger)} if raw.comms_logger.enabled else {}),
    }
