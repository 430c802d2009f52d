"""Other people's models, given our weights, compute our loss and our gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gptscale.bench import peers
from gptscale.bench.peers import build_peer, prove_equal
from gptscale.config.schema import ModelConfig
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise

GPT2 = ModelConfig(layers=2, width=64, heads=4, init_std=0.2)
LLAMA = ModelConfig(
    layers=2,
    width=64,
    heads=4,
    kv_heads=2,
    init_std=0.2,
    positions="rope",
    norm="rmsnorm",
    feedforward="swiglu",
    bias=False,
    tied_embeddings=False,
)
PEERS = [("nanogpt", GPT2), ("hf-gpt2", GPT2), ("hf-llama", LLAMA)]


def ours(config: ModelConfig) -> GPT:
    # 300 pieces: the padding up to 384 takes no probability, and a peer does not have it.
    model = GPT(config, 300, 32, torch.float32)
    initialise(model, 0)
    return model


@pytest.mark.parametrize(("name", "config"), PEERS, ids=[name for name, _ in PEERS])
def test_a_peer_computes_what_we_do(name: str, config: ModelConfig) -> None:
    model = ours(config)
    rows = torch.randint(0, 300, (3, 33), generator=torch.Generator().manual_seed(0))
    inputs_BT, targets_BT = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    expected = model(inputs_BT, targets_BT) / targets_BT.numel()
    expected.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    for attention in ("sdpa", "eager"):
        peer, loss = build_peer(name, model, attention)
        found = loss(inputs_BT, targets_BT)
        torch.autograd.backward(found)
        # fp32 rounding of sums over some hundred terms.
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        theirs = [p.grad for p in peer.parameters() if p.grad is not None]
        assert float(torch.nn.utils.get_total_norm(theirs)) == pytest.approx(float(norm), rel=1e-4)


def test_a_wrong_map_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in PEERS:
        prove_equal(name, config, 300, "sdpa")
    right = peers.fill

    def swapped(model: nn.Module, mapped: dict[str, Tensor]) -> None:
        weight = mapped["transformer.h.1.attn.c_attn.weight"].detach().clone()
        weight[:, :64], weight[:, 64:128] = weight[:, 64:128].clone(), weight[:, :64].clone()
        right(model, {**mapped, "transformer.h.1.attn.c_attn.weight": weight})

    monkeypatch.setattr(peers, "fill", swapped)
    with pytest.raises(RuntimeError, match="hf-gpt2 does not compute what ours does"):
        prove_equal("hf-gpt2", replace(GPT2, init_std=0.02), 300, "sdpa")
