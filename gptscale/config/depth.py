"""`model.depth`: one dial for a whole family of models, and the rules by which all else follows. Pure, no torch.

A setting follows unless somebody set it: in an experiment, in an option of a group, or on the command line. What was
set counts: with `model.layers=20` beside `model.depth=12`, twenty layers decide on tokens, batch and learning rate.
These do not follow `train.tokens` and `train.steps`, so that a run may be cut short or go on longer.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Final

from gptscale.config.schema import TrainRoot
from gptscale.runtime.errors import UserError

SIZE_KEYS: Final = ("model.layers", "model.width", "model.heads", "model.head_width")
DERIVED_KEYS: Final = (
    *SIZE_KEYS,
    "model.init_std",
    "train.tokens",
    "train.global_batch",
    "optimizer.learning_rate",
    "schedule.warmup_tokens",
)
"""All that follows from the depth."""

ASPECT: Final = 64
"""Width a layer. GPT-3 Small to XL have 43 to 85; nanochat has 64 at every depth (github.com/karpathy/nanochat)."""
WIDE: Final = 1024
"""From this width on heads have 128 features, as in GPT-3 XL, Llama 3 and Qwen3; below it 64, as in GPT-3 Small."""
TOKENS_PER_PARAMETER: Final = 20
"""Compute-optimal length (Hoffmann et al., "Chinchilla", arXiv 2203.15556, table 3)."""
SMALLEST_BATCH: Final = 8
"""Sequences: fewer are hard to cut into ranks and micro-batches."""


def derive(settings: TrainRoot, unset: Container[str]) -> dict[str, int | float | None]:
    """Values of the `DERIVED_KEYS` that are in `unset`, for `settings.model.depth`, which must not be None.

    `settings` holds defaults where nobody set anything. Raises UserError where no value can follow from what is set.
    """
    model, train, length = settings.model, settings.train, settings.data.sequence_length
    assert model.depth is not None
    vocab_size = settings.tokenizer.vocab_size
    _at_least_one("model.depth", model.depth)
    _at_least_one("data.sequence_length", length)
    _at_least_one("tokenizer.vocab_size", vocab_size)
    if model.head_width is not None:
        _at_least_one("model.head_width", model.head_width)
    layers = model.depth if "model.layers" in unset else model.layers
    width = _width(model.depth, model.head_width) if "model.width" in unset else model.width
    _at_least_one("model.layers", layers)
    _at_least_one("model.width", width)
    heads, head_width = model.heads, model.head_width
    if "model.heads" in unset:
        head_width = head_width or default_head_width(width)
        heads = _heads(width, head_width)

    parameters = family_parameters(layers, width, vocab_size, model.tied_embeddings)
    tokens = TOKENS_PER_PARAMETER * parameters
    compute = training_flops(layers, width, length, tokens)
    optimal_batch = batch_tokens(compute) / length
    if "train.global_batch" in unset:
        # A power of two divides into ranks. The optimum is flat: what it is rounded by does not move the learning rate.
        batch = max(SMALLEST_BATCH, 2 ** round(math.log2(optimal_batch)))
        rate = learning_rate(compute)
    else:
        # Adam's rate grows with the root of the batch (Malladi et al., arXiv 2205.10330).
        batch = train.global_batch
        rate = learning_rate(compute) * math.sqrt(max(1, batch) / optimal_batch)
    values: dict[str, int | float | None] = {
        "model.layers": layers,
        "model.width": width,
        "model.heads": heads,
        "model.head_width": head_width,
        "model.init_std": _rounded(initial_std(width)),
        "train.tokens": tokens if train.steps is None else None,
        "train.global_batch": batch,
        "optimizer.learning_rate": _rounded(rate),
        # As many tokens as parameters, 5 % of the run (Porian et al., arXiv 2406.19146, section 3): one warm-up for all
        # sizes would be too long for the small ones.
        "schedule.warmup_tokens": parameters,
    }
    return {key: value for key, value in values.items() if key in unset}


def family_parameters(layers: int, width: int, vocab_size: int, tied: bool) -> int:
    """N ≈ 12 · layers · width² (Kaplan et al., arXiv 2001.08361, equation 2.1), and the vocabulary's tables.

    Of layers and width alone, so that variants of one depth (fewer key/value heads, another feed-forward) are trained
    alike and their losses can be compared. `gptscale.model.count` counts a model exactly.
    """
    return 12 * layers * width * width + (1 if tied else 2) * vocab_size * width


def training_flops(layers: int, width: int, sequence_length: int, tokens: int) -> float:
    """C = M · tokens with M = 72 · layers · width² + 12 · layers · width · length (DeepSeek LLM, arXiv 2401.02954).

    Without embeddings and head, and with attention not halved for causality: so `batch_tokens` and `learning_rate`
    were fitted. `gptscale.model.count.flops_per_token` counts what is computed.
    """
    return float(72 * layers * width * width + 12 * layers * width * sequence_length) * tokens


def batch_tokens(compute: float) -> float:
    """Tokens a step that train best with so many operations (DeepSeek LLM, section 3.1, equation 1).

    Fitted together with `learning_rate` for AdamW with betas of 0.9 and 0.95, a weight decay of 0.1 and a clip norm of
    1.0, which are this framework's defaults; so weight decay stays as it is.
    """
    return float(0.2920 * compute**0.3271)


def learning_rate(compute: float) -> float:
    """The rate to go with `batch_tokens`.

    For `experiment=first`, with 1e13 operations far below the fit's 1e17 to 2e19, it gives 7.5e-3; measured there, 5e-3
    is best and 8e-3 worse by 0.02 bits a byte.
    """
    return float(0.3118 * compute**-0.1250)


def initial_std(width: int) -> float:
    """√(2 / (5·width)) (Nguyen & Salazar, arXiv 1910.05895, "SmallInit"; GPT-NeoX has it too)."""
    return math.sqrt(2 / (5 * width))


def default_head_width(width: int) -> int:
    return 128 if width >= WIDE else 64


def _width(depth: int, head_width: int | None) -> int:
    """64 · depth, up to a whole number of heads (nanochat's rule)."""
    step = head_width or default_head_width(ASPECT * depth)
    return -(-ASPECT * depth // step) * step


def _heads(width: int, head_width: int) -> int:
    if width % head_width:
        below = width // head_width * head_width
        raise UserError(
            f"model.depth makes heads of {head_width} features, which do not fill model.width={width}\n"
            f"use model.width={below or head_width} or {below + head_width}, or set model.heads too"
        )
    return width // head_width


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{key}={value} is below 1\nset {key}=1 or more")


def _rounded(value: float) -> float:
    """To three digits: what is written down should be readable."""
    return float(f"{value:.3g}")
