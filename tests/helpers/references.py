"""Our models as transformers has them: the same weights in its classes, and its gradients under our names.

Each family has one linear map from our parameters to its own. Weights go through the map, and gradients back through
its transpose, which autograd applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import has_experts
from gptscale.flow import IGNORED_TARGET

Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Reference:
    """A class of transformers' and the map to its parameters."""

    build: Callable[[ModelConfig, int, int], Any]
    """(settings, vocabulary, positions) → the reference model."""
    parameters: Callable[[Named, ModelConfig], dict[str, Tensor]]
    """Our parameters → the reference's, by its names."""

    def evaluate(
        self, ours: Named, config: ModelConfig, vocab: int, positions: int, inputs_BT: Tensor, targets_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reference's fp32 logits [B, T, V], and the gradient of the summed loss under our names."""
        model = self.build(config, vocab, positions).float().eval()
        leaves = {name: p.detach().clone().requires_grad_() for name, p in ours.items()}
        mapped = self.parameters(leaves, config)
        own = dict(model.named_parameters())
        assert own.keys() == mapped.keys(), sorted(own.keys() ^ mapped.keys())
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(mapped[name])
        logits_BTV = model(input_ids=inputs_BT, use_cache=False).logits
        torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum", ignore_index=IGNORED_TARGET
        ).backward()
        torch.autograd.backward([mapped[name] for name in own], [parameter.grad for parameter in own.values()])
        return logits_BTV.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _gpt2(config: ModelConfig, vocab: int, positions: int) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab,
            n_positions=positions,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            activation_function="gelu_new",
            layer_norm_epsilon=config.norm_epsilon,
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _gpt2_parameters(p: Named, config: ModelConfig) -> dict[str, Tensor]:
    made = {"transformer.wte.weight": p["embedding.weight"], "transformer.wpe.weight": p["embedding.positions"]}
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        for kind in ("weight", "bias"):
            turn = (lambda x: x.T) if kind == "weight" else (lambda x: x)  # its Conv1D holds [I, O]
            made[f"{theirs}ln_1.{kind}"] = p[f"{ours}attention_norm.{kind}"]
            made[f"{theirs}ln_2.{kind}"] = p[f"{ours}feedforward_norm.{kind}"]
            made[f"{theirs}attn.c_attn.{kind}"] = turn(torch.cat([p[f"{ours}attention.{x}.{kind}"] for x in "qkv"]))
            made[f"{theirs}attn.c_proj.{kind}"] = turn(p[f"{ours}attention.o.{kind}"])
            made[f"{theirs}mlp.c_fc.{kind}"] = turn(p[f"{ours}feedforward.up.{kind}"])
            made[f"{theirs}mlp.c_proj.{kind}"] = turn(p[f"{ours}feedforward.down.{kind}"])
    return made | {f"transformer.ln_f.{kind}": p[f"head.norm.{kind}"] for kind in ("weight", "bias")}


def _gpt_neo(config: ModelConfig, vocab: int, positions: int) -> Any:
    kinds = {"full": "global", "window": "local"}
    pattern = [kinds[kind] for kind in config.attention_pattern]
    return transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=vocab,
            max_position_embeddings=positions,
            hidden_size=config.width,
            num_layers=config.layers,
            num_heads=config.heads,
            attention_types=[[pattern, config.layers // len(pattern)]],
            window_size=config.window,
            activation_function="gelu_new",
            layer_norm_epsilon=config.norm_epsilon,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _gpt_neo_parameters(p: Named, config: ModelConfig) -> dict[str, Tensor]:
    made = {"transformer.wte.weight": p["embedding.weight"], "transformer.wpe.weight": p["embedding.positions"]}
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        # It does not divide scores by √W, so queries are divided in its place.
        scale = (config.width // config.heads) ** -0.5
        for name in "qkv":
            weight = p[f"{ours}attention.{name}.weight"]
            made[f"{theirs}attn.attention.{name}_proj.weight"] = weight * scale if name == "q" else weight
        for kind in ("weight", "bias"):
            made[f"{theirs}ln_1.{kind}"] = p[f"{ours}attention_norm.{kind}"]
            made[f"{theirs}ln_2.{kind}"] = p[f"{ours}feedforward_norm.{kind}"]
            made[f"{theirs}attn.attention.out_proj.{kind}"] = p[f"{ours}attention.o.{kind}"]
            made[f"{theirs}mlp.c_fc.{kind}"] = p[f"{ours}feedforward.up.{kind}"]
            made[f"{theirs}mlp.c_proj.{kind}"] = p[f"{ours}feedforward.down.{kind}"]
    return made | {f"transformer.ln_f.{kind}": p[f"head.norm.{kind}"] for kind in ("weight", "bias")}


def _common(config: ModelConfig, vocab: int, positions: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = config.rope_original_length
    if config.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_width or config.width // config.heads,
        "intermediate_size": config.feedforward_width,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_parameters": rope,
        "attn_implementation": "eager",
    }


def _llama(config: ModelConfig, vocab: int, positions: int) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_common(config, vocab, positions)))


def _qwen3(config: ModelConfig, vocab: int, positions: int) -> Any:
    kinds = {"full": "full_attention", "window": "sliding_attention"}
    pattern = config.attention_pattern
    return transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            **_common(config, vocab, positions),
            use_sliding_window="window" in pattern,
            sliding_window=config.window,
            layer_types=[kinds[pattern[i % len(pattern)]] for i in range(config.layers)],
        )
    )


def _mixtral(config: ModelConfig, vocab: int, positions: int) -> Any:
    shape = _common(config, vocab, positions) | {"intermediate_size": config.expert_width}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **shape, num_local_experts=config.experts, num_experts_per_tok=config.experts_per_token
        )
    )


def _qwen3_moe(config: ModelConfig, vocab: int, positions: int) -> Any:
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **_common(config, vocab, positions),
            moe_intermediate_size=config.expert_width,
            num_experts=config.experts,
            num_experts_per_tok=config.experts_per_token,
            norm_topk_prob=True,
            mlp_only_layers=[i for i in range(config.layers) if not has_experts(config, i)],
        )
    )


def _with_experts(p: Named, config: ModelConfig) -> dict[str, Tensor]:
    """Llama's, but for layers with experts: up and gate lie in one stack there."""
    made = _llama_parameters(p, config)
    for i in range(config.layers):
        if has_experts(config, i):
            ours, theirs = f"blocks.{i}.feedforward.", f"model.layers.{i}.mlp."
            made[f"{theirs}gate.weight"] = p[f"{ours}router.scores.weight"]
            made[f"{theirs}experts.gate_up_proj"] = torch.cat([p[f"{ours}experts.gate"], p[f"{ours}experts.up"]], dim=1)
            made[f"{theirs}experts.down_proj"] = p[f"{ours}experts.down"]
    return made


def _llama_parameters(p: Named, config: ModelConfig) -> dict[str, Tensor]:
    made = {"model.embed_tokens.weight": p["embedding.weight"], "model.norm.weight": p["head.norm.weight"]}
    if not config.tied_embeddings:
        made["lm_head.weight"] = p["head.weight"]
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        made[f"{theirs}input_layernorm.weight"] = p[f"{ours}attention_norm.weight"]
        made[f"{theirs}post_attention_layernorm.weight"] = p[f"{ours}feedforward_norm.weight"]
        for name in "qkvo":
            made[f"{theirs}self_attn.{name}_proj.weight"] = p[f"{ours}attention.{name}.weight"]
        for name in () if has_experts(config, i) else ("gate", "up", "down"):
            made[f"{theirs}mlp.{name}_proj.weight"] = p[f"{ours}feedforward.{name}.weight"]
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                made[f"{theirs}self_attn.{name}.weight"] = p[f"{ours}attention.{name}.weight"]
    return made


GPT2 = Reference(_gpt2, _gpt2_parameters)
GPT_NEO = Reference(_gpt_neo, _gpt_neo_parameters)
LLAMA = Reference(_llama, _llama_parameters)
QWEN3 = Reference(_qwen3, _llama_parameters)
MIXTRAL = Reference(_mixtral, _with_experts)
QWEN3_MOE = Reference(_qwen3_moe, _with_experts)
