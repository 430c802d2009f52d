"""Cross-entropy over the vocabulary that never holds all the logits.

Shape legend: N tokens, C tokens of a chunk, D width, V padded vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from gptscale.flow import IGNORED_TARGET


class VocabularyPart(Protocol):
    """Consecutive rows of a vocabulary, and those who hold the others: what they hold together is asked here.

    Everybody asks for the same, in the same order, about the same tokens.
    """

    first: int
    """Number, in the vocabulary, of the first row held here."""

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over all parts; may overwrite `values`."""

    def total(self, values: Tensor) -> Tensor:
        """Elementwise sum over all parts; may overwrite `values`."""

    def joined(self, logits: Tensor) -> Tensor:
        """All parts' columns [..., V], in order."""


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    vocab_size: int,
    chunk_tokens: int,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    gain: float | None = None,
    part: VocabularyPart | None = None,
) -> Tensor:
    """Sum over targets ≠ IGNORED_TARGET of −log softmax(hidden · weightᵀ)[target]; fp32 scalar.

    With `softcap` the logits are `soft_cap`ped. `z_loss` · log²(Σ exp logits) of each such target (PaLM, arXiv
    2204.02311, section 5; there 1e-4) is in the gradient and not in the value, which stays the cross-entropy.

    Rows of `weight_VD` from `vocab_size` on are padding and take no probability. Products run in the type of
    `hidden_ND`, log-sum-exp and the gradient of the weight in fp32. At most `chunk_tokens` rows of logits exist at
    once.

    The gradients of each chunk are computed while its logits are at hand, so a training step costs three matrix
    products and recomputes nothing; backward only scales them, and can therefore run once. Without gradients to
    compute (evaluation) there is one product.

    `gain` foretells the gradient that backward will bring: the loss scale times the weight of a token. Gradients are
    multiplied by it before they are rounded, so that in fp16 the small ones survive, as a loss scale means them to.

    With a `part`, `weight_VD` are the rows of that part. The loss is that of the whole vocabulary, and so is the
    gradient of these rows; that of `hidden_ND` has to be summed over the parts.
    """
    train = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, vocab_size, chunk_tokens, softcap, z_loss, gain, part, train
    )
    return loss


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap): within ±cap, with a gradient everywhere (Gemma 2, arXiv 2408.00118, section 2)."""
    return cap * torch.tanh(logits / cap)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        softcap: float,
        z_loss: float,
        gain: float | None,
        part: VocabularyPart | None,
        train: bool,
    ) -> Tensor:
        cast_weight_VD = weight_VD.to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND) if train and ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.empty_like(weight_VD) if train and ctx.needs_input_grad[1] else None
        # Log-sum-exp and the sum in fp32 at least (a float64 model stays float64). Chunks share their scratch.
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss = hidden_ND.new_zeros((), dtype=wide)
        scratch_logits_CV, scratch_p_CV = hidden_ND.new_empty(
            2, min(chunk_tokens, len(targets_N)), len(weight_VD), dtype=wide
        )

        first = 0 if part is None else part.first
        real = min(max(vocab_size - first, 0), len(weight_VD))  # rows; padding follows
        for start in range(0, len(targets_N), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
            logits_CV, p_CV = scratch_logits_CV[: len(targets_C)], scratch_p_CV[: len(targets_C)]
            if hidden_CD.dtype == wide:
                torch.mm(hidden_CD, cast_weight_VD.t(), out=logits_CV)
            else:
                logits_CV.copy_(hidden_CD @ cast_weight_VD.t())
            if softcap:
                logits_CV.div_(softcap).tanh_().mul_(softcap)
            logits_CV[:, real:] = -torch.inf
            used_C1 = (targets_C != IGNORED_TARGET).unsqueeze(1)
            index_C1 = (targets_C - first).unsqueeze(1).clamp(0, len(weight_VD) - 1)
            target_C1 = logits_CV.gather(1, index_C1)
            minus_one_C1 = p_CV.new_full((), -1.0).expand(index_C1.shape)
            if part is None:
                torch._softmax(logits_CV, -1, False, out=p_CV)
                # The largest probability is exp(largest logit − lse), at least 1/V: its logarithm is exact to rounding.
                lse_C1 = logits_CV.amax(1, keepdim=True) - p_CV.amax(1, keepdim=True).log_()
            else:
                here_C1 = (targets_C - first == index_C1.squeeze(1)).unsqueeze(1)
                target_C1 = part.total(torch.where(here_C1, target_C1, 0))
                minus_one_C1 = -here_C1.to(wide)
                lse_C1 = _softmax_over_parts(logits_CV, part, out=p_CV)
            loss += ((lse_C1 - target_C1) * used_C1).sum()
            if not train:
                continue
            # d loss / d logits = softmax − one-hot. Ignored rows are dropped where they are narrow: after the product
            # with the weight, and before the one with the hidden state.
            if z_loss:  # d z·lse² / d logits = 2 · z · lse · softmax
                p_CV *= 1 + 2 * z_loss * lse_C1
            p_CV.scatter_add_(1, index_C1, minus_one_C1)
            if softcap:  # d cap · tanh(x / cap) / dx = 1 − tanh²; padding has no gradient to pass on
                slope_CV = logits_CV[:, :real].div_(softcap).square_().neg_().add_(1)
                p_CV[:, :real].mul_(slope_CV)
            if gain is not None:
                p_CV *= gain
            grad_CV = p_CV.to(hidden_CD.dtype)
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, cast_weight_VD, out=grad_hidden_ND[rows]).mul_(used_C1)
            if grad_weight_VD is None:
                continue
            used_CD = hidden_CD * used_C1
            if grad_weight_VD.dtype == grad_CV.dtype:
                beta = 1 if start else 0
                torch.addmm(grad_weight_VD, grad_CV.t(), used_CD, beta=beta, out=grad_weight_VD)
            elif start:
                grad_weight_VD += grad_CV.t() @ used_CD
            else:
                grad_weight_VD.copy_(grad_CV.t() @ used_CD)

        ctx.grads = (grad_hidden_ND, grad_weight_VD)
        ctx.gain = 1.0 if gain is None else gain
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.grads is None:
            raise RuntimeError(
                "the gradient of chunked_cross_entropy was scaled in place and can be asked for only once"
            )
        # In place: a second [V, D] would be the largest tensor of the step.
        rest = grads[0] / ctx.gain  # 1 where the gain was foretold, to rounding
        scaled = tuple(None if grad is None else grad.mul_(rest) for grad in ctx.grads)
        ctx.grads = None
        return *scaled, None, None, None, None, None, None, None, None


def _softmax_over_parts(logits_CV: Tensor, part: VocabularyPart, out: Tensor) -> Tensor:
    """This part of the softmax over all parts into `out`; returns log Σ exp over all of them: [C, 1]."""
    largest_C1 = part.largest(logits_CV.amax(1, keepdim=True))
    torch.sub(logits_CV, largest_C1, out=out).exp_()
    total_C1 = part.total(out.sum(1, keepdim=True))
    out.div_(total_C1)
    return largest_C1 + total_C1.log()
