"""bf16 and fp16: fp32 parameters, half-precision products, results close to fp32, no cast copies kept."""

from __future__ import annotations

import pytest
import torch

from gptscale.config.schema import ModelConfig
from gptscale.model.attention import AttentionKernel
from gptscale.model.gpt import GPT
from gptscale.model.init import initialise
from tests.helpers.memory import saved_for_backward
from tests.helpers.plain_gpt import GPT3, ROTARY, VARIANTS, large_weights, random_batch

VOCAB = 75
TOKENS = 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [GPT3, ROTARY], ids=["gpt3", "rotary"])
def test_half_precision_stays_close_to_fp32(config: ModelConfig, dtype: torch.dtype) -> None:
    inputs_BT, targets_BT = random_batch(VOCAB, 4, TOKENS)
    losses, gradients = [], []
    for compute_dtype in (torch.float32, dtype):
        model = GPT(config, VOCAB, TOKENS, compute_dtype)
        initialise(model, 0)
        loss = model(inputs_BT, targets_BT)
        (loss / inputs_BT.numel()).backward()
        assert loss.dtype == torch.float32
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        assert model.logits(inputs_BT).dtype == torch.float32
        assert model.embedding(inputs_BT).dtype == compute_dtype
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for name, expected in gradients[0].items():
        made = gradients[1][name]
        assert made.dtype == torch.float32
        if not name.endswith("k.bias"):
            assert torch.cosine_similarity(made.flatten(), expected.flatten(), 0) > 0.99, name


@pytest.mark.parametrize("config", [GPT3, ROTARY], ids=["gpt3", "rotary"])
def test_no_cast_copy_of_a_matrix_outlives_forward(config: ModelConfig) -> None:
    model = large_weights(GPT(config, VOCAB, TOKENS, torch.bfloat16))
    inputs_BT, targets_BT = random_batch(VOCAB, 3, TOKENS)
    matrices = {p.data_ptr(): tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    shapes = set(matrices.values()) | {shape[::-1] for shape in matrices.values()}
    saved = saved_for_backward(lambda: model(inputs_BT, targets_BT))
    copies = [t.shape for t in saved if tuple(t.shape) in shapes and t.data_ptr() not in matrices]
    assert not copies
    assert len([t for t in saved if t.data_ptr() in matrices]) >= 6 * config.layers


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize("name", ["gpt3_banded", "modern"])
def test_fp16_gradients_are_right_at_any_size_of_batch(name: str, kernel: AttentionKernel) -> None:
    """Scaled, as training does, they are those of fp32 to the 2⁻¹¹ of a chain of products. Unscaled, small ones are
    gone: a token's weight in the mean is that of a batch of a million.
    """
    inputs_BT, targets_BT = random_batch(VOCAB, 3, TOKENS)
    weight = 1e-6  # of a token in the mean
    gradients = {}
    for case, dtype, scale in (
        ("fp32", torch.float32, 1.0),
        ("scaled", torch.float16, 2.0**20),
        ("unscaled", torch.float16, 1.0),
    ):
        model = large_weights(GPT(VARIANTS[name], VOCAB, TOKENS, dtype), std=0.15)
        model.use_attention(kernel)
        loss = model(inputs_BT, targets_BT, loss_gain=scale * weight)
        (loss * weight * scale).backward()
        gradients[case] = {key: p.grad / scale for key, p in model.named_parameters() if not key.endswith("k.bias")}
    errors = {
        case: max(
            float((made - gradients["fp32"][key]).abs().max() / gradients["fp32"][key].abs().max())
            for key, made in gradients[case].items()
        )
        for case in ("scaled", "unscaled")
    }
    print(name, kernel, errors)
    assert all(gradient.isfinite().all() for gradient in gradients["scaled"].values())
    assert errors["scaled"] < 0.01
    assert errors["unscaled"] > 0.1, "the control"
