"""Batches as the model gets them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptscale.flow import Batch
from gptscale.parallel.plain import on_device


class Wide(NamedTuple):
    """int64 ids; silent targets are marked."""

    inputs_BT: Tensor
    targets_BT: Tensor
    loss_tokens: int
    starts_BT: Tensor | None


def wide(batch: Batch) -> Wide:
    inputs_BT, targets_BT, _ = on_device(batch, torch.device("cpu"))
    return Wide(inputs_BT, targets_BT, batch.loss_tokens, batch.starts_BT)
