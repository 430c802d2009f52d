"""The nouns that cross stages: text → shards → batch → step → pieces of a checkpoint.

Nothing here computes. Torch is imported for type checkers only, so that stages which never touch a tensor stay light.

Shape legend: B sequences of a micro-batch, T tokens of a sequence, T1 = T + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

IGNORED_TARGET = -100
"""A target that carries no loss (the value `torch.nn.functional.cross_entropy` ignores by default)."""

StateKind = str
"""What a piece holds: `weight`, the fp32 weight, or a state that an optimizer keeps of it, e.g. Adam's `exp_avg`."""


@dataclass(frozen=True)
class Shard:
    """One file of token ids and one of document ends, as a manifest records them."""

    name: str
    """File stem, e.g. `shard-00000`; the files are `<name>.tok.npy` and `<name>.end.npy`."""
    tokens: int
    documents: int
    token_bytes: int
    """Size of the token file in bytes, header included."""
    end_bytes: int
    token_xxh3_128: str
    end_xxh3_128: str


@dataclass(frozen=True)
class Position:
    """Where a run stands in its sample order: the next sample to use, and the ranges it jumped over."""

    samples: int = 0
    skipped: tuple[tuple[int, int], ...] = ()


class Batch(NamedTuple):
    """One micro-batch of one data rank.

    `tokens_BT1` [B, T+1] are inputs, all but a row's last, and targets, all but its first: int64, or of the type that
    shards have, for the way to the device, where they are widened. `loss_tokens` counts the targets that carry loss, on
    the host, so that nobody has to ask the device.
    """

    tokens_BT1: Tensor
    loss_tokens: int
    starts_BT: Tensor | None = None
    """With document masks: for each token the position in its row at which its document begins; int64, on the host."""
    silent_BT: Tensor | None = None
    """True where a target carries no loss; None: nowhere."""


class Duration(Protocol):
    """Time between two marks on a device. Whoever reads it before the device has passed the second waits for that."""

    def seconds(self) -> float: ...


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports. Tensors and durations stay on the device until somebody reads them."""

    loss: Tensor
    """fp32 scalar: mean over the loss-bearing tokens of the global batch, before the update."""
    grad_norm: Tensor
    """fp32 scalar: L2 norm over all parameters before clipping; not finite exactly when the update was skipped."""
    loss_tokens: int
    """Loss-bearing tokens of the global batch."""
    forward_backward: Duration | None = None
    """Of all micro-batches on this rank, with the reduction of gradients where it runs during backward (ZeRO-2, 3)."""
    update: Duration | None = None
    """The rest of the step: reduction, norm, clipping, optimizer, gathering weights."""
    loss_scale: float | None = None
    """What the loss was multiplied by before backward; None where nothing is scaled."""
    noise_signal: Tensor | None = None
    """fp32 scalar, where it was asked for: unbiased estimate of the squared norm of the true gradient."""
    noise_trace: Tensor | None = None
    """fp32 scalar, where it was asked for: unbiased estimate of the trace of a token's gradient covariance."""

    @property
    def forward_backward_s(self) -> float | None:
        return None if self.forward_backward is None else self.forward_backward.seconds()

    @property
    def update_s(self) -> float | None:
        return None if self.update is None else self.update.seconds()


@dataclass(frozen=True)
class TensorShard:
    """The slice of a parameter that a tensor-parallel rank holds: `[start, start + size)` of dimension `dim`."""

    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Piece:
    """A contiguous range of one parameter's state, held by this rank.

    `values` is a 1-D fp32 view of live storage: a save reads it, a load copies into it. The range is
    `[start, start + values.numel())` of the flattened parameter, or of its flattened `shard` where there is one.
    """

    parameter: str
    """Canonical name, e.g. `blocks.7.attention.q.weight`."""
    kind: StateKind
    shape: tuple[int, ...]
    """Shape of the whole parameter, whatever part of it this rank holds."""
    start: int
    values: Tensor
    shard: TensorShard | None = None
    writes: bool = True
    """False on ranks that hold a copy which another rank writes; every copy is loaded."""
