"""Batches as the model gets them."""

from __future__ import annotations

from dataclasses import replace

import torch

from gptscale.flow import Batch
from gptscale.parallel.plain import on_device


def wide(batch: Batch) -> Batch:
    """With int64 ids, silent targets marked in them."""
    inputs_BT, targets_BT, _ = on_device(batch, torch.device("cpu"))
    return replace(batch, inputs_BT=inputs_BT, targets_BT=targets_BT, silent_BT=None)
