"""`torch.compile`, a block at a time: what training computes again and again becomes a few fused kernels.

Only training is compiled. Evaluation and generation, whose shapes are their own, run as written.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch._functorch import config as functorch

from gptscale.model.gpt import GPT
from gptscale.runtime.errors import UserError

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": True, "emulate_precision_casts": True}
"""Dropout draws, and half precision rounds, as without a compiler. Without the second, a bf16 gradient of a modern
block was measured 2e-2 of its largest value away, and 2e-4 with it."""


def compile_blocks(model: GPT) -> None:
    """Have the blocks of a model compiled when they are first trained.

    A block names the methods that can be compiled whole in `compiled_parts`, as `gptscale.model.gpt.Block` does; of one
    that names none, `forward` is compiled as far as the compiler gets. Either way hooks on the block stay outside.
    Blocks alike share their code, so the time this takes does not grow with the number of layers.
    """
    # Or casts of the weights are kept for backward, whole even where ZeRO-3 has given the weights themselves away.
    functorch.ban_recompute_materialized_backward = False
    for block in model.blocks:
        parts: tuple[str, ...] | None = getattr(block, "compiled_parts", None)
        for part in parts or ("forward",):
            eager = getattr(block, part)
            compiled = torch.compile(eager, fullgraph=parts is not None, options=OPTIONS)
            setattr(block, part, _in_training(eager, compiled))
        block.compiled = True  # type: ignore[assignment]


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether this is a block that training compiles, with all that it holds."""
    return getattr(module, "compiled", False) is True


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch cannot compile for this device."""
    probe = torch.compile(lambda x: (x.sin() + 1).exp())
    try:
        # A cache would need no compiler.
        with _quiet(), torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
            probe(torch.ones(8, device=device))
    except Exception as error:
        why = str(error).strip().splitlines()[0]
        needed = "a C++ compiler and Python's headers" if device.type == "cpu" else "triton, and a C compiler"
        raise UserError(
            f"train.compile=block: torch cannot compile on this host: {why}\n"
            f"it needs {needed}; install them, or set train.compile=none"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of caches and their folders: the error says what a user has to know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _in_training(eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(eager)
    def call(*arguments: Any, **named: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*arguments, **named)

    return call
