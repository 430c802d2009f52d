"""The chunked loss against the whole one, and what it promises about memory, padding and work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptscale.flow import IGNORED_TARGET
from gptscale.model.loss import chunked_cross_entropy
from tests.helpers.matmul_count import count_matmuls
from tests.helpers.memory import peak_bytes


def case(tokens: int = 50, width: int = 24, vocab: int = 37, rows: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(rows, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    targets[::7] = IGNORED_TARGET
    return hidden, weight, targets


def whole(hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int) -> Tensor:
    logits = hidden.double() @ weight[:vocab].double().T
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED_TARGET)


@pytest.mark.parametrize("chunk", [1, 16, 50, 1000])
@pytest.mark.parametrize("vocab", [37, 48])
def test_equals_the_whole_loss(chunk: int, vocab: int) -> None:
    hidden, weight, targets = case()
    loss = chunked_cross_entropy(hidden, weight, targets, vocab, chunk)
    expected = whole(hidden, weight, targets, vocab)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    made = torch.autograd.grad(loss * 0.3, (hidden, weight))
    right = torch.autograd.grad(expected * 0.3, (hidden, weight))
    for gradient, reference in zip(made, right, strict=True):
        assert (gradient - reference).abs().max().item() < 1e-6 * reference.abs().max().item()
    assert made[0][::7].abs().max() == 0
    assert vocab == 48 or made[1][vocab:].abs().max() == 0


@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize(("softcap", "z_loss"), [(5.0, 0.0), (0.0, 0.1), (5.0, 0.1)])
def test_soft_cap_and_z_loss(chunk: int, softcap: float, z_loss: float) -> None:
    hidden, weight, targets = case()
    loss = chunked_cross_entropy(hidden, weight, targets, 37, chunk, softcap, z_loss)
    logits = hidden.double() @ weight[:37].double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    cross_entropy = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED_TARGET)
    denominators = logits.logsumexp(1)[targets != IGNORED_TARGET]
    made = torch.autograd.grad(loss * 0.3, (hidden, weight))
    right = torch.autograd.grad((cross_entropy + z_loss * denominators.square().sum()) * 0.3, (hidden, weight))
    plain = torch.autograd.grad(whole(hidden, weight, targets, 37) * 0.3, (hidden, weight))
    assert loss.item() == pytest.approx(cross_entropy.item(), rel=1e-6), "without the auxiliary term"
    for gradient, reference, control in zip(made, right, plain, strict=True):
        assert (gradient - reference).abs().max().item() < 2e-6 * reference.abs().max().item()
        assert (gradient - control).abs().max().item() > 0.05 * reference.abs().max().item()
    assert made[1][37:].abs().max() == 0


def test_extreme_logits_stay_exact() -> None:
    hidden, weight, targets = case()
    for scale in (1e-4, 300.0, 1e15):
        scaled = (hidden.detach() * scale).requires_grad_()
        loss = chunked_cross_entropy(scaled, weight, targets, 37, 16)
        assert loss.item() == pytest.approx(whole(scaled, weight, targets, 37).item(), rel=1e-6)
        assert torch.autograd.grad(loss, weight)[0].isfinite().all()


def test_nothing_but_ignored_targets() -> None:
    hidden, weight, targets = case()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, IGNORED_TARGET), 37, 16)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.abs().max() == weight.grad.abs().max() == 0


def test_a_frozen_part_gets_no_gradient() -> None:
    hidden, weight, targets = case()
    expected = torch.autograd.grad(whole(hidden, weight, targets, 37), (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight.detach(), targets, 37, 16)
    assert torch.allclose(torch.autograd.grad(loss, hidden)[0], expected[0], atol=1e-5)
    loss = chunked_cross_entropy(hidden.detach(), weight, targets, 37, 16)
    assert torch.allclose(torch.autograd.grad(loss, weight)[0], expected[1], atol=1e-5)


def test_backward_runs_once() -> None:
    hidden, weight, targets = case()
    loss = chunked_cross_entropy(hidden, weight, targets, 37, 16)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_bf16_sums_the_weight_gradient_in_fp32() -> None:
    torch.manual_seed(0)
    tokens, width, vocab = 4096, 16, 32
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    gradients = {}
    for chunk in (16, tokens):
        loss = chunked_cross_entropy(hidden, weight, targets, vocab, chunk)
        (gradients[chunk],) = torch.autograd.grad(loss, weight)
        assert loss.dtype == gradients[chunk].dtype == torch.float32
    expected = torch.autograd.grad(whole(hidden, weight, targets, vocab), weight)[0]
    scale = expected.abs().max().item()
    # 256 chunks summed in bf16 would lose most of each addend.
    assert (gradients[16] - expected).abs().max().item() < 0.01 * scale
    assert (gradients[tokens] - expected).abs().max().item() < 0.01 * scale


@pytest.mark.parametrize("gain", [None, 1024.0])
def test_gradients_of_sure_predictions_survive_fp16_where_the_gain_is_foretold(gain: float | None) -> None:
    """Tokens predicted with 1 − 1e-5 from small weights have gradients that fp16 rounds to zero, but for a loss scale.

    Here they are computed before backward brings the scale: it has to be known, and applied before they are rounded.
    """
    torch.manual_seed(0)
    weight = (torch.eye(16, 24) * 2**-9).requires_grad_()
    targets = torch.arange(16).repeat(2)
    sure = 7168 * torch.eye(16, 24)[targets]  # logits of 14 above those of the others
    hidden = (sure + torch.randint(0, 500, sure.shape)).half().requires_grad_()
    scale = 1024.0
    loss = chunked_cross_entropy(hidden, weight, targets, 16, 16, gain=gain)
    made = torch.autograd.grad(loss * scale, hidden)[0]
    right = torch.autograd.grad(whole(hidden, weight, targets, 16) * scale, hidden)[0]
    assert right.dtype == made.dtype == torch.float16
    lost = float((right != 0)[made == 0].sum() / (right != 0).sum())
    error = float((made.float() - right.float()).norm() / right.float().norm())
    if gain is None:
        assert lost > 0.5, "the control: most are gone, though fp16 could hold them"
        assert error > 0.2
    else:
        # Logits are fp16 too: those of 14 are off by up to 2⁻⁸, and probabilities with them.
        assert lost == 0
        assert error < 0.01


@pytest.mark.parametrize("gain", [1.0, 0.3, 77.0])
def test_a_gain_changes_nothing_in_fp32(gain: float) -> None:
    hidden, weight, targets = case()
    made = torch.autograd.grad(
        chunked_cross_entropy(hidden, weight, targets, 37, 16, gain=gain) * 0.3, (hidden, weight)
    )
    right = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets, 37, 16) * 0.3, (hidden, weight))
    for gradient, reference in zip(made, right, strict=True):
        assert (gradient - reference).abs().max().item() < 1e-6 * reference.abs().max().item()


def test_evaluation_does_no_gradient_work() -> None:
    hidden, weight, targets = case()
    training = count_matmuls(lambda: chunked_cross_entropy(hidden, weight, targets, 37, 16).backward())
    with torch.no_grad():
        evaluation = count_matmuls(lambda: chunked_cross_entropy(hidden, weight, targets, 37, 16))
        assert not chunked_cross_entropy(hidden, weight, targets, 37, 16).requires_grad
    assert training.dense == 3 * evaluation.dense == 3 * 2 * 50 * 48 * 24


def test_never_holds_all_the_logits() -> None:
    width, vocab, chunk = 8, 4096, 64
    peaks = {}
    for tokens in (512, 2048):
        hidden, weight, targets = case(tokens, width, vocab, vocab)

        def step(hidden: Tensor = hidden, weight: Tensor = weight, targets: Tensor = targets) -> None:
            chunked_cross_entropy(hidden, weight, targets, vocab, chunk).backward()

        peaks[tokens] = peak_bytes(step)
    chunk_bytes = chunk * vocab * 4
    # Longer input adds its own gradient and a few numbers a token, no logits.
    assert peaks[2048] - peaks[512] < (2048 - 512) * (width + 16) * 4
    assert peaks[2048] < 4 * chunk_bytes + 3 * vocab * width * 4
    assert peak_bytes(lambda: whole(hidden, weight, targets, vocab).backward()) > 2048 * vocab * 4
