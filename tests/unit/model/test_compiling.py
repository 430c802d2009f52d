"""Compiled blocks: the same dropout, no more memory, and nothing compiled but training.

A kernel costs a second or two to compile, so tests share models and shapes: the compiler's cache has most of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from gptscale.config.schema import ModelConfig
from gptscale.model.compiling import check_compiler, compile_blocks, is_compiled
from gptscale.model.gpt import BLOCKS, GPT
from gptscale.model.init import initialise
from gptscale.runtime.errors import UserError
from tests.helpers.memory import saved_for_backward, storage_bytes

MODEL = ModelConfig(layers=3, width=64, heads=4, kv_heads=2, init_std=0.2, dropout=0.1)
MODERN = ModelConfig(
    layers=3,
    width=64,
    heads=4,
    init_std=0.2,
    positions="rope",
    norm="rmsnorm",
    feedforward="swiglu",
    bias=False,
    qk_norm=True,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(config: ModelConfig, compute: torch.dtype = torch.float32, compiled: bool = False) -> GPT:
    model = GPT(config, 300, 64, compute)
    initialise(model, 0)
    if compiled:
        compile_blocks(model)
    return model


def rows(sequences: int = 2, tokens: int = 64) -> Tensor:
    return torch.randint(0, 300, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def gradients(model: GPT, seed: int = 0, tokens: int = 64) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    inputs_BT = rows(tokens=tokens)
    model(inputs_BT, inputs_BT.roll(-1, 1)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    names = [name for name in a if not name.endswith("k.bias")]  # whose true gradient is zero
    return max(float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in names)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_draws_as_it_does_without_a_compiler(recompute: bool) -> None:
    eager, compiled = build(MODEL), build(MODEL, compiled=True)
    compiled.activation_checkpointing = "full" if recompute else "none"
    expected = gradients(eager)
    assert apart(expected, gradients(compiled)) < 1e-5  # the promise for another layout
    assert apart(expected, gradients(compiled, seed=1)) > 0.1


@pytest.mark.parametrize("config", [replace(MODEL, dropout=0.0), MODERN], ids=["gpt3", "modern"])
def test_bf16_gradients_are_as_near_to_fp32_as_without_a_compiler(config: ModelConfig) -> None:
    right = gradients(build(config))
    names = [name for name in right if not name.endswith("k.bias")]

    def error(compiled: bool) -> float:
        found = gradients(build(config, torch.bfloat16, compiled))
        return sum(apart({name: right[name]}, {name: found[name]}) for name in names) / len(names)

    eager, compiled = error(False), error(True)
    print(eager, compiled)
    assert compiled <= 1.1 * eager, "on average: single tensors may round either way"
    assert compiled > 1e-3, "it was bf16"


@pytest.mark.parametrize("config", [replace(MODEL, dropout=0.0), MODERN], ids=["gpt3", "modern"])
def test_no_more_is_kept_for_backward(config: ModelConfig) -> None:
    """Not the weights' cast copies either, which would stay whole under ZeRO-3."""

    def held(compiled: bool) -> int:
        model, inputs_BT = build(config, torch.bfloat16, compiled), rows()
        gradients(model)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = saved_for_backward(lambda: model(inputs_BT, inputs_BT))
        return storage_bytes([t for t in kept if t.untyped_storage().data_ptr() not in own])

    eager, compiled = held(False), held(True)
    print(compiled / eager)
    assert compiled <= eager


def test_only_training_is_compiled_and_once_for_all_layers() -> None:
    model = build(MODERN, torch.bfloat16, compiled=True)
    gradients(model)
    assert counters["stats"]["unique_graphs"] == 2
    expected = build(MODERN, torch.bfloat16)
    with torch.no_grad():
        for tokens in (64, 17, 9):
            assert torch.equal(model(rows(3, tokens)), expected(rows(3, tokens)))
    gradients(model)
    assert counters["stats"]["unique_graphs"] == 2


def test_sequences_that_grow_are_compiled_for_twice() -> None:
    """As `train.length_from` has them: for the first length, and then for any."""
    eager, compiled = build(MODERN), build(MODERN, compiled=True)
    for tokens in (8, 16, 32, 64):
        assert apart(gradients(eager, tokens=tokens), gradients(compiled, tokens=tokens)) < 1e-5
    assert counters["stats"]["unique_graphs"] == 2 * 2


def test_a_block_of_ones_own_is_compiled_as_far_as_it_goes() -> None:
    class Odd(nn.Module):
        def __init__(self, config: ModelConfig, layer: int, rotary: object) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(config.width, config.width))

        def forward(self, x_BTD: Tensor, cache: object = None) -> Tensor:
            y_BTD = torch.tanh(x_BTD @ self.weight)
            if float(y_BTD.detach().sum()) > 1e9:  # asks for a number, which no compiler can
                return x_BTD
            return x_BTD + torch.sin(y_BTD)

    BLOCKS.register("odd")(Odd)
    try:
        config = ModelConfig(layers=2, width=32, heads=2, block="odd", init_std=0.2)
        compiled = build(config, compiled=True)
        assert apart(gradients(build(config)), gradients(compiled)) < 1e-5
        assert counters["stats"]["unique_graphs"] >= 2, "both sides of the question"
        assert [is_compiled(module) for module in compiled.blocks] == [True, True]
        assert not is_compiled(compiled)
    finally:
        del BLOCKS._parts["odd"]


def test_without_a_compiler_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiler(torch.device("cpu"))
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    with pytest.raises(UserError, match=r"train\.compile=block: .*\n.*set train\.compile=none") as refused:
        check_compiler(torch.device("cpu"))
    assert len(str(refused.value).splitlines()) == 2
