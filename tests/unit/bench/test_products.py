"""The products that are replayed are those of the step."""

from __future__ import annotations

import pytest
import torch

from gptscale.bench.products import ProductRecorder, replay
from gptscale.config.schema import ModelConfig
from gptscale.model.count import matmul_parameter_count
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from gptscale.model.kernels import KernelName

VOCABULARY, ROWS, LENGTH = 256, 2, 32
CONFIG = ModelConfig(layers=2, width=64, heads=4)


def recorded(kernel: KernelName) -> ProductRecorder:
    model = GPT(CONFIG, VOCABULARY, LENGTH, torch.float32)
    initialise(model, 0)
    model.use_attention(kernel)
    rows = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with ProductRecorder() as recorder:
        torch.autograd.backward(model(rows[:, :-1], rows[:, 1:]))
    return recorder


def test_forward_and_backward_multiply_as_often_as_the_formula_counts() -> None:
    """Two operations forward and four backward for every weight and token; within a fused kernel none is seen."""
    matrices = 6 * matmul_parameter_count(CONFIG, VOCABULARY) * ROWS * LENGTH
    assert recorded("sdpa").flops == matrices
    # Of scores and of values, forward and each twice backward; over the blocks that a causal mask leaves: here one.
    attention = 6 * 2 * CONFIG.layers * ROWS * LENGTH * LENGTH * CONFIG.width
    assert recorded("blocked").flops == matrices + attention


def test_a_replay_makes_the_same_products() -> None:
    first = recorded("blocked")
    assert len(first.calls) > 20
    with ProductRecorder() as again:
        replay(first.calls, torch.device("cpu"))([])
    assert again.calls == first.calls


def test_a_replay_leaves_what_it_reads_as_it_is() -> None:
    """A result written over an operand would be another number each time, in the end nought or infinite."""
    a = torch.randn(8, 8)
    with ProductRecorder() as recorder:
        torch.mm(a, a, out=torch.empty(8, 8))
        torch.empty(8, 8).addmm_(a, a)
        torch.mm(a[:1].expand(8, 8), a)  # a row that is there once
    torch.manual_seed(0)
    step = replay(recorder.calls, torch.device("cpu"))
    first = step([])
    assert first != 0
    assert [step([]) for _ in range(10)] == [first] * 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_recorded_as_it_lies_in_memory(dtype: torch.dtype) -> None:
    a, b = torch.ones(6, 4, dtype=dtype), torch.ones(3, 6, dtype=dtype)
    with ProductRecorder() as recorder:
        torch.addmm(torch.ones(4, dtype=dtype), b, a, beta=0.5)
        torch.mm(a.T, b.T)
    (_, (_, x, y), named), (_, (u, v), _) = recorder.calls
    assert named == {"beta": 0.5}
    assert (x.shape, x.stride, y.shape, y.dtype) == ((3, 6), (6, 1), (6, 4), dtype)
    assert (u.shape, u.stride, v.shape, v.stride) == ((4, 6), (1, 4), (6, 3), (1, 6))
    assert recorder.flops == 2 * 3 * 6 * 4 + 2 * 4 * 6 * 3
