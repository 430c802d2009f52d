"""What must hold between the settings of a model. Pure, no torch.

Each rule refuses with one UserError that names the key and the fix.
"""

from __future__ import annotations

from gptscale.config.limits import above_zero, at_least, nearest_divisor
from gptscale.config.schema import ModelConfig
from gptscale.config.shape import kv_heads
from gptscale.runtime.errors import UserError


def check_model(model: ModelConfig) -> None:
    at_least("model.layers", model.layers, 1)
    at_least("model.heads", model.heads, 1)
    at_least("model.width", model.width, 1)
    at_least("model.vocab_multiple", model.vocab_multiple, 1)
    at_least("model.loss_chunk", model.loss_chunk, 1)
    if model.head_width is not None:
        at_least("model.head_width", model.head_width, 1)
    elif model.width % model.heads:
        below, above = model.width // model.heads * model.heads, -(-model.width // model.heads) * model.heads
        raise UserError(
            f"model.heads={model.heads} does not divide model.width={model.width}\n"
            f"use model.width={below or above} or {above}, or model.heads={nearest_divisor(model.width, model.heads)}"
        )
    width = model.width // model.heads if model.head_width is None else model.head_width
    at_least("model.kv_heads", kv_heads(model), 1)
    if model.feedforward_width is not None:
        at_least("model.feedforward_width", model.feedforward_width, 1)
    for name in ("rope_theta", "norm_epsilon", "init_std", "embedding_scale"):
        above_zero(f"model.{name}", getattr(model, name), str(getattr(ModelConfig, name)))
    if model.heads % kv_heads(model):
        raise UserError(
            f"model.kv_heads={kv_heads(model)} does not divide model.heads={model.heads}\n"
            f"use model.kv_heads={nearest_divisor(model.heads, kv_heads(model))}"
        )
    if model.positions == "rope" and width % 2:
        raise UserError(
            f"model.positions=rope rotates pairs of features, but a head has {width}\n"
            "choose model.width and model.heads, or model.head_width, so that this is even"
        )
    _check_windows(model)
    _check_rope_scaling(model)
    if model.experts:
        _check_experts(model)
    at_least("model.logit_softcap", model.logit_softcap, 0)
    at_least("model.z_loss", model.z_loss, 0)
    if not 0 <= model.dropout < 1:
        raise UserError(
            f"model.dropout={model.dropout} is not a probability below 1\nuse a value from 0 up to 1, e.g. 0.1"
        )


def _check_windows(model: ModelConfig) -> None:
    if not model.attention_pattern:
        raise UserError("model.attention_pattern is empty\nname at least one kind of layer, e.g. [full]")
    if model.window is not None:
        at_least("model.window", model.window, 1)
    elif "window" in model.attention_pattern:
        raise UserError(
            "model.attention_pattern has window layers, and model.window is not set\nset it, e.g. model.window=256"
        )


def _check_experts(model: ModelConfig) -> None:
    for key, least in (("experts", 2), ("experts_per_token", 1), ("shared_experts", 0), ("expert_capacity", 0)):
        at_least(f"model.{key}", getattr(model, key), least)
    at_least("model.balance_loss", model.balance_loss, 0)
    at_least("model.router_z_loss", model.router_z_loss, 0)
    if model.expert_width is not None:
        at_least("model.expert_width", model.expert_width, 1)
    if model.experts_per_token > model.experts:
        raise UserError(
            f"model.experts_per_token={model.experts_per_token} is more than model.experts={model.experts}\n"
            f"use model.experts_per_token={model.experts} or fewer"
        )
    if "experts" not in model.expert_layers:
        raise UserError(
            f"model.experts={model.experts}, and model.expert_layers names no layer that has them\n"
            "use model.expert_layers=[experts], or [dense,experts] for every other layer"
        )
    if model.bias:
        raise UserError(
            f"model.experts={model.experts}, and experts have no biases\nset model.bias=false, or model.experts=0"
        )
    if model.block != "gpt":
        raise UserError(
            f"model.experts={model.experts} is for model.block=gpt, and model.block={model.block}\nset model.experts=0"
        )


def _check_rope_scaling(model: ModelConfig) -> None:
    if model.rope_scaling == "none":
        if model.rope_factor != 1:
            raise UserError(
                f"model.rope_factor={model.rope_factor} has no effect with model.rope_scaling=none\n"
                "choose linear, llama3 or yarn, or leave model.rope_factor=1"
            )
        return
    if model.positions != "rope":
        raise UserError(f"model.rope_scaling={model.rope_scaling} needs rotary positions\nset model.positions=rope")
    at_least("model.rope_factor", model.rope_factor, 1)
    if model.rope_scaling != "linear" and model.rope_original_length is None:
        raise UserError(
            f"model.rope_scaling={model.rope_scaling} needs the length that the frequencies were trained with\n"
            "set model.rope_original_length, e.g. 4096"
        )
    if model.rope_original_length is not None:
        at_least("model.rope_original_length", model.rope_original_length, 1)
    if model.rope_scaling == "yarn" and model.rope_theta <= 1:
        raise UserError(
            f"model.rope_theta={model.rope_theta}: by YaRN's rules the frequencies fall from pair to pair\n"
            "use a base above 1, e.g. model.rope_theta=10000"
        )
