"""Other people's models with our weights, for a step beside ours: Hugging Face's, and one in nanoGPT's style.

Each is used as its own training script would: its own forward with its own loss, autocast where products are bf16, and
torch's AdamW. Our weights are copied in, so that equal losses prove equal work.

Shape legend: B sequences, T tokens, D width, H heads, W features of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import feedforward_width, head_width, kv_heads
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise

PROOF_STD, PROOF_TOKENS = 0.2, 64
PROOF_TOLERANCE = 1e-4
"""fp32 rounding through some layers. Two matrices that changed places move the loss by far more."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(inputs_BT, targets_BT) → mean loss of the micro-batch, by the peer's own forward and loss."""


def build_peer(name: str, ours: GPT, attention: str) -> tuple[nn.Module, Loss]:
    """The peer of this name with the weights of `ours`. Hugging Face's attention is `sdpa` or `eager`."""
    if name == "nanogpt":
        model = NanoGPT(ours)
        return model, model
    make = {"hf-gpt2": hf_gpt2, "hf-llama": hf_llama}[name]
    hugging_face = make(ours, attention)

    def loss(inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        # `labels` would be shifted once more; with `shift_labels` the class takes targets as they are.
        found: Tensor = hugging_face(
            input_ids=inputs_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False
        ).loss
        return found

    return hugging_face, loss


@torch.no_grad()
def prove_equal(name: str, config: ModelConfig, vocab_size: int, attention: str) -> None:
    """Raises RuntimeError where the peer does not compute what ours does.

    In fp32, at weights of `PROOF_STD`: at initial ones attention hardly moves the loss, and a wrong map would not show.
    """
    ours = GPT(replace(config, init_std=PROOF_STD), vocab_size, PROOF_TOKENS, torch.float32)
    initialise(ours, seed=0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocab_size, (2, PROOF_TOKENS + 1), generator=generator)
    inputs_BT, targets_BT = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    _, mean_loss = build_peer(name, ours, attention)
    expected = float(ours.eval()(inputs_BT, targets_BT)) / targets_BT.numel()
    found = float(mean_loss(inputs_BT, targets_BT))
    if not abs(found - expected) <= PROOF_TOLERANCE * expected:
        raise RuntimeError(f"{name} does not compute what ours does: its loss is {found:.6f}, ours {expected:.6f}")


def hf_gpt2(ours: GPT, attention: str) -> Any:
    import transformers

    config = ours.config
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=ours.vocab_size,
            n_positions=ours.sequence_length,
            n_embd=config.width,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=feedforward_width(config),
            activation_function="gelu_new",
            layer_norm_epsilon=config.norm_epsilon,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            tie_word_embeddings=config.tied_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.set_attn_implementation(attention)
    weights = dict(ours.named_parameters())
    vocabulary = ours.vocab_size
    mapped = {
        "transformer.wte.weight": weights["embedding.weight"][:vocabulary],
        "transformer.wpe.weight": weights["embedding.positions"],
        "transformer.ln_f.weight": weights["head.norm.weight"],
        "transformer.ln_f.bias": weights["head.norm.bias"],
    }
    if not config.tied_embeddings:
        mapped["lm_head.weight"] = weights["head.weight"][:vocabulary]
    for layer in range(config.layers):
        here, there = f"blocks.{layer}.", f"transformer.h.{layer}."
        for kind in ("weight", "bias"):
            mapped[f"{there}ln_1.{kind}"] = weights[f"{here}attention_norm.{kind}"]
            mapped[f"{there}ln_2.{kind}"] = weights[f"{here}feedforward_norm.{kind}"]
            qkv = torch.cat([weights[f"{here}attention.{part}.{kind}"] for part in "qkv"])
            # GPT-2's Conv1D keeps its matrices the other way round.
            mapped[f"{there}attn.c_attn.{kind}"] = qkv.mT if kind == "weight" else qkv
            for theirs, name in (
                ("attn.c_proj", "attention.o"),
                ("mlp.c_fc", "feedforward.up"),
                ("mlp.c_proj", "feedforward.down"),
            ):
                value = weights[f"{here}{name}.{kind}"]
                mapped[f"{there}{theirs}.{kind}"] = value.mT if kind == "weight" else value
    fill(model, mapped)
    return model


def hf_llama(ours: GPT, attention: str) -> Any:
    import transformers

    config = ours.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=ours.vocab_size,
            hidden_size=config.width,
            intermediate_size=feedforward_width(config),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=kv_heads(config),
            head_dim=head_width(config),
            max_position_embeddings=ours.sequence_length,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied_embeddings,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.set_attn_implementation(attention)
    weights = dict(ours.named_parameters())
    vocabulary = ours.vocab_size
    mapped = {
        "model.embed_tokens.weight": weights["embedding.weight"][:vocabulary],
        "model.norm.weight": weights["head.norm.weight"],
    }
    if not config.tied_embeddings:
        mapped["lm_head.weight"] = weights["head.weight"][:vocabulary]
    for layer in range(config.layers):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        mapped[f"{there}input_layernorm.weight"] = weights[f"{here}attention_norm.weight"]
        mapped[f"{there}post_attention_layernorm.weight"] = weights[f"{here}feedforward_norm.weight"]
        for part in "qkvo":
            mapped[f"{there}self_attn.{part}_proj.weight"] = weights[f"{here}attention.{part}.weight"]
        for part in ("gate", "up", "down"):
            mapped[f"{there}mlp.{part}_proj.weight"] = weights[f"{here}feedforward.{part}.weight"]
    fill(model, mapped)
    return model


@torch.no_grad()
def fill(model: nn.Module, mapped: dict[str, Tensor]) -> None:
    """Every parameter of a peer, each once."""
    own = dict(model.named_parameters())
    assert own.keys() == mapped.keys(), sorted(own.keys() ^ mapped.keys())
    for name, parameter in own.items():
        assert parameter.shape == mapped[name].shape, name
        parameter.copy_(mapped[name])


def canonical(name: str) -> str:
    """A peer's parameter under a name by which our optimizers know what it is: a table of positions does not decay."""
    return "embedding.positions" if name in ("transformer.wpe.weight", "positions.weight") else name


class NanoGPT(nn.Module):
    """A GPT as one would write it in two hundred lines of plain PyTorch, in nanoGPT's style.

    One projection for queries, keys and values, torch's attention, modules and functions of torch alone, all logits at
    once, one cross-entropy.
    """

    def __init__(self, ours: GPT) -> None:
        super().__init__()
        config, width = ours.config, ours.config.width
        self.tokens = nn.Embedding(ours.vocab_size, width)
        self.positions = nn.Embedding(ours.sequence_length, width)
        self.blocks = nn.ModuleList(NanoBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.head = nn.Linear(width, ours.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        weights = dict(ours.named_parameters())
        mapped = {
            "tokens.weight": weights["embedding.weight"][: ours.vocab_size],
            "positions.weight": weights["embedding.positions"],
            "norm.weight": weights["head.norm.weight"],
            "norm.bias": weights["head.norm.bias"],
        }
        for layer in range(config.layers):
            here = f"blocks.{layer}."
            for kind in ("weight", "bias"):
                mapped[f"{here}qkv.{kind}"] = torch.cat([weights[f"{here}attention.{part}.{kind}"] for part in "qkv"])
                for theirs, name in (("o", "attention.o"), ("up", "feedforward.up"), ("down", "feedforward.down")):
                    mapped[f"{here}{theirs}.{kind}"] = weights[f"{here}{name}.{kind}"]
                for theirs, name in (("norm_1", "attention_norm"), ("norm_2", "feedforward_norm")):
                    mapped[f"{here}{theirs}.{kind}"] = weights[f"{here}{name}.{kind}"]
        fill(self, mapped)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        places_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
        x_BTD = self.tokens(inputs_BT) + self.positions(places_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


class NanoBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_1 = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.qkv = nn.Linear(width, 3 * width)
        self.o = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, eps=config.norm_epsilon)
        self.up = nn.Linear(width, feedforward_width(config))
        self.down = nn.Linear(feedforward_width(config), width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, tokens, width = x_BTD.shape
        qkv = self.qkv(self.norm_1(x_BTD)).view(batch, tokens, 3, self.heads, width // self.heads)
        q_BHTW, k_BHTW, v_BHTW = qkv.permute(2, 0, 3, 1, 4)
        y_BHTW = F.scaled_dot_product_attention(q_BHTW, k_BHTW, v_BHTW, is_causal=True)
        x_BTD = x_BTD + self.o(y_BHTW.transpose(1, 2).reshape(batch, tokens, width))
        hidden = F.gelu(self.up(self.norm_2(x_BTD)), approximate="tanh")
        grown: Tensor = x_BTD + self.down(hidden)
        return grown
