"""GPT: an embedding, blocks and a head. Knows no ranks.

Shape legend: B batch, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptscale.config.model_rules import check_model
from gptscale.config.schema import Checkpointing, ModelConfig
from gptscale.config.shape import has_experts, padded_vocab
from gptscale.model.attention import Attention, AttentionKernel, LayerCache, LayerKind
from gptscale.model.documents import Documents
from gptscale.model.experts import ExpertFeedForward
from gptscale.model.feedforward import FeedForward
from gptscale.model.kernels import KERNELS
from gptscale.model.linear import Again, linear
from gptscale.model.loss import VocabularyPart, chunked_cross_entropy, soft_cap
from gptscale.model.norm import build_norm
from gptscale.model.positions import RotaryTable, Turns
from gptscale.runtime.registry import Registry


class Cache(Protocol):
    """Keys and values of tokens already seen (`gptscale.generate.cache` has one)."""

    positions_BT: Tensor

    def begin(self, tokens: int) -> None:
        """Announces that `tokens` more of each row go through the model."""

    def layer(self, index: int) -> LayerCache:
        """The part that block `index` uses."""

    def end(self) -> None:
        """All layers have stored their part."""


class Embedding(nn.Module):
    """Token ids → residual stream in the compute type, with learned positions where the settings ask for them."""

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_length: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.compute_dtype = compute_dtype
        self.scale = config.embedding_scale
        self.weight = nn.Parameter(torch.empty(padded_vocab(vocab_size, config.vocab_multiple), config.width))
        learned = config.positions == "learned"
        self.positions = nn.Parameter(torch.empty(sequence_length, config.width)) if learned else None
        self.lookup: Callable[[Tensor, Tensor], Tensor] = F.embedding
        """Ids, weight → rows: another where the weight is a part of the vocabulary."""

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        x_BTD = self.lookup(ids_BT, self.weight)
        if self.scale != 1.0:
            x_BTD = x_BTD * self.scale
        if self.positions is not None:
            tokens = ids_BT.shape[1]
            here = self.positions[:tokens] if positions_BT is None else F.embedding(positions_BT, self.positions)
            x_BTD = x_BTD + here
        return F.dropout(x_BTD.to(self.compute_dtype), self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feedforward(norm(x)): pre-norm, as in GPT-2 and since."""

    def __init__(self, config: ModelConfig, layer: int, rotary: RotaryTable | None) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, layer, rotary)
        self.feedforward_norm = build_norm(config)
        self.feedforward = ExpertFeedForward(config) if has_experts(config, layer) else FeedForward(config)

    compiled_parts = "before", "after"
    """What `train.compile` compiles: all but the attention between them, whose kernels are as fast as they get."""

    def forward(
        self,
        x_BTD: Tensor,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
        selective: bool = False,
    ) -> Tensor:
        """`selective`: backward makes again what norms and activations gave."""
        q_BTHW, k_BTKW, v_BTKW = self.before(x_BTD, self.attention.turns(x_BTD, cache), selective)
        return self.after(x_BTD, self.attention.attend(q_BTHW, k_BTKW, v_BTKW, cache, documents), selective)

    def before(self, x_BTD: Tensor, turns: Turns | None, selective: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        again = Again(self.attention_norm, x_BTD, uses=3) if selective else None
        return self.attention.project(self.attention_norm(x_BTD), turns, again)

    def after(self, x_BTD: Tensor, y_BTHW: Tensor, selective: bool = False) -> Tensor:
        """What comes of the residual stream and of attention's findings."""
        x_BTD = x_BTD + self._dropped(self.attention.output(y_BTHW))
        again = Again(self.feedforward_norm, x_BTD, uses=self.feedforward.products) if selective else None
        return x_BTD + self._dropped(self.feedforward(self.feedforward_norm(x_BTD), again))

    def _dropped(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout) if self.training and self.dropout else x_BTD


BuildBlock = Callable[[ModelConfig, int, RotaryTable | None], nn.Module]
"""Settings, number of the layer, table of rotations (with `positions=rope`) → a module called as `Block` is: with a
cache in generation, with `documents=…` where `data.document_mask` is set."""

BLOCKS: Registry[BuildBlock] = Registry("model.block", "gptscale.blocks")
BLOCKS.register("gpt")(Block)


class Head(nn.Module):
    """Final norm, projection onto the vocabulary, and the loss. `tied` is the embedding's own parameter, if it is."""

    def __init__(self, config: ModelConfig, vocab_size: int, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.loss_chunk = config.loss_chunk
        self.softcap = config.logit_softcap
        self.z_loss = config.z_loss
        self.norm = build_norm(config)
        self.part: VocabularyPart | None = None
        """Which rows of the vocabulary `weight` holds; None: all."""
        rows = padded_vocab(vocab_size, config.vocab_multiple)
        self.weight = nn.Parameter(torch.empty(rows, config.width)) if tied is None else tied

    def forward(self, x_BTD: Tensor, targets_BT: Tensor | None = None, loss_gain: float | None = None) -> Tensor:
        """With targets: fp32 scalar, the sum of token losses (z-loss is in its gradient only).

        Without: fp32 logits [B, T, V] of the real vocabulary.
        """
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            logits_BTV = linear(x_BTD, self.weight)
            if self.part is not None:
                logits_BTV = self.part.joined(logits_BTV)
            logits_BTV = logits_BTV[..., : self.vocab_size].float()
            return soft_cap(logits_BTV, self.softcap) if self.softcap else logits_BTV
        return chunked_cross_entropy(
            x_BTD.flatten(0, 1),
            self.weight,
            targets_BT.flatten(),
            self.vocab_size,
            self.loss_chunk,
            softcap=self.softcap,
            z_loss=self.z_loss,
            gain=loss_gain,
            part=self.part,
        )


class GPT(nn.Module):
    """A decoder-only transformer. Parameters are fp32, unset until `initialise` (or a checkpoint) fills them.

    `vocab_size` is the tokenizer's; the embedding is padded up to a multiple of `config.vocab_multiple`, and the
    padding takes no probability. Products run in `compute_dtype`. Construction works on the meta device:
    `with torch.device("meta"): model = GPT(…)`, then `model.to_empty(device=…)` and `initialise`.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, sequence_length: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        check_model(config)
        self.config = config
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.compute_dtype = compute_dtype
        self.activation_checkpointing: Checkpointing = "none"
        """`full`: a block keeps its input only, and runs again in backward. `selective`: norms and activations do."""
        self.checkpoint_interval = 1
        """Of so many blocks one does."""

        rope = config.positions == "rope"
        self.rotary = RotaryTable(config, sequence_length) if rope else None
        self.embedding = Embedding(config, vocab_size, sequence_length, compute_dtype)
        self.blocks = nn.ModuleList(
            BLOCKS.get(config.block)(config, layer, self.rotary) for layer in range(config.layers)
        )
        self.head = Head(config, vocab_size, self.embedding.weight if config.tied_embeddings else None)
        self._experts = [module for module in self.modules() if isinstance(module, ExpertFeedForward)]

    def sequence(self) -> list[tuple[str, nn.Module]]:
        """What forward runs, in order, by canonical name: embedding, blocks.0, …, head. A pipeline cuts this list."""
        blocks = [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]
        return [("embedding", self.embedding), *blocks, ("head", self.head)]

    def forward(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor | None = None,
        documents: Documents | None = None,
        loss_gain: float | None = None,
        last_B: Tensor | None = None,
    ) -> Tensor:
        """fp32 scalar: sum of token losses over targets ≠ IGNORED_TARGET. The one entry of training and evaluation.

        With `documents` a token sees nothing from before its document's start, and learned positions begin anew there.
        Without targets: `logits`, for engines whose hooks want to see every use of the model begin here.
        `loss_gain` foretells the gradient that backward will bring, which fp16 needs (`chunked_cross_entropy`).
        """
        if targets_BT is None:
            return self.logits(inputs_BT, last_B=last_B)
        x_BTD = self.embedding(inputs_BT, None if documents is None else documents.positions)
        with self._hear_experts() as auxiliary:
            x_BTD = self.through(range(len(self.blocks)), x_BTD, documents)
        loss: Tensor = self.head(x_BTD, targets_BT, loss_gain)
        for of_block in auxiliary:
            loss = loss + (of_block - of_block.detach())  # in the gradient only
        return loss

    @contextmanager
    def _hear_experts(self) -> Iterator[list[Tensor]]:
        """Within, the auxiliary losses of blocks with experts are put on a list: those of training, with a gradient."""
        heard: list[Tensor] = []
        if self.training and torch.is_grad_enabled():
            for layer in self._experts:
                layer.heard = heard
        yield heard
        for layer in self._experts:  # what activation checkpointing runs again in backward has been heard
            layer.heard = None

    def through(self, blocks: range, x_BTD: Tensor, documents: Documents | None = None) -> Tensor:
        """What these blocks make of the residual stream."""
        within: dict[str, Any] = {} if documents is None else {"documents": documents}
        for number in blocks:
            block = self.blocks[number]
            chosen = torch.is_grad_enabled() and number % self.checkpoint_interval == 0
            if chosen and self.activation_checkpointing == "full":
                random = self.config.dropout > 0
                run = partial(block, **within)
                x_BTD = checkpoint(run, x_BTD, use_reentrant=False, preserve_rng_state=random)
            elif chosen and self.activation_checkpointing == "selective":
                x_BTD = block(x_BTD, **within, selective=True)
            else:
                x_BTD = block(x_BTD, **within)
        return x_BTD

    def logits(self, inputs_BT: Tensor, cache: Cache | None = None, last_B: Tensor | None = None) -> Tensor:
        """fp32 logits [B, T, V] over the real vocabulary, for generation.

        With a cache, `inputs_BT` continue the rows it holds. With `last_B`, logits of that one position of each row
        only: [B, 1, V].
        """
        if cache is not None:
            cache.begin(inputs_BT.shape[1])
        x_BTD = self.embedding(inputs_BT, None if cache is None else cache.positions_BT)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, None if cache is None else cache.layer(i))
        if cache is not None:
            cache.end()
        if last_B is not None:
            x_BTD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B].unsqueeze(1)
        logits_BTV: Tensor = self.head(x_BTD)
        return logits_BTV

    def use_attention(self, kernel: AttentionKernel, kind: LayerKind | None = None) -> None:
        """Sets the attention kernel of every layer of a kind, or of all layers.

        Without a `kind`, window layers go by the rule where `kernel` has no windows.
        """
        windows = kernel == "auto" or KERNELS[kernel].windows
        for module in self.modules():
            if isinstance(module, Attention) and kind in (None, module.kind):
                module.kernel = "auto" if kind is None and module.kind == "window" and not windows else kernel

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        # Leaving the meta device makes new parameters one by one, which would untie the two.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.config.tied_embeddings:
            self.head.weight = self.embedding.weight
        return self
