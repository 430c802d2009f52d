"""Muon: momentum whose update is made orthogonal, matrix by matrix; AdamW for all that is no matrix of a block.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the two changes of Liu et al.,
"Muon is scalable for LLM training" (arXiv 2502.16982, section 2.2): decoupled weight decay, and updates scaled to the
size that AdamW's have, so that one learning rate serves both.

An update needs whole matrices, and under ZeRO a rank holds pieces. Momentum is elementwise and stays where it is. Then
every matrix has one owner: pieces travel to it, it orthogonalises, and pieces of the result travel back. Each matrix is
worked on once in the world, and only its owner ever holds it whole. The gradient that comes in has been clipped by the
engine, as for any optimizer (DeepSpeed's own Muon clips the orthogonalised update).

Shape legend: S matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptscale.parallel.optimizer_state import Span, ensure_state, kinds_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of one Newton–Schulz step: chosen by Jordan et al. for a steep rise at zero. Five steps bring singular values
from 2e-3 of the norm on to within 0.68 … 1.21; that they are not exactly 1 was found to do no harm."""
STACK_ELEMENTS = 1 << 26
"""Matrices of one shape are multiplied together, up to so many numbers at once."""


@dataclass(frozen=True)
class Part:
    """Elements [start, start + size) of a flattened matrix, as one rank holds them."""

    matrix: str
    shape: tuple[int, ...]
    """Of the matrix."""
    start: int
    size: int


class Muon(torch.optim.Optimizer):
    """Groups with `orthogonal: True` hold matrices; the others are AdamW's.

    As built, it holds every matrix whole. An engine that puts flat tensors in their place says so with `bind`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        newton_schulz_steps: int = 5,
        update_rms: float = 0.2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        """A group of matrices has their canonical names in `parameters`.

        `update_rms`: root mean square of an update at learning rate 1; AdamW's is 0.2 to 0.4 (arXiv 2502.16982).
        """
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "newton_schulz_steps": newton_schulz_steps,
            "update_rms": update_rms,
        }
        super().__init__(list(groups), defaults)
        self._matrices = {name for group in self.param_groups if group["orthogonal"] for name in group["parameters"]}
        self._exchanges: dict[int, Exchange] = {}
        adam = [group for group in self.param_groups if not group["orthogonal"]]
        self._adam = torch.optim.AdamW(adam, lr=lr, betas=betas, eps=eps, fused=True) if adam else None
        if self._adam is not None:
            self._adam.state = self.state  # one state for whoever saves it; the groups are shared as well

    def bind(self, flats: Sequence[tuple[Tensor, Sequence[Span]]]) -> None:
        for flat, spans in flats:
            exchange = Exchange(spans)
            found = exchange.names & self._matrices
            assert not found or found == exchange.names, "a flat tensor holds matrices and others"
            if found:
                self._exchanges[id(flat)] = exchange

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. A tensor without a gradient stays as it is."""
        assert closure is None
        if self._adam is not None:
            self._adam.param_groups = [group for group in self.param_groups if not group["orthogonal"]]
            if self._adam.param_groups:
                self._adam.step()
        for group in self.param_groups:
            if group["orthogonal"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        whole: list[tuple[Tensor, Tensor]] = []
        for tensor in group["params"]:
            if tensor.grad is None:
                continue
            state = ensure_state(self, tensor, kinds_of(group))
            state["step"] += 1
            momentum = state["momentum_buffer"].lerp_(tensor.grad, 1 - group["momentum"])
            ahead = tensor.grad.lerp(momentum, group["momentum"])  # Nesterov
            tensor.mul_(1 - group["lr"] * group["weight_decay"])
            if id(tensor) in self._exchanges:
                self._step_pieces(tensor, ahead, group)
            else:
                whole.append((tensor, ahead))
        updates = orthogonalised([ahead for _, ahead in whole], group["newton_schulz_steps"])
        for (tensor, _), update in zip(whole, updates, strict=True):
            tensor.add_(update, alpha=-group["lr"] * update_scale(tensor.shape, group["update_rms"]))

    def _step_pieces(self, flat: Tensor, ahead: Tensor, group: dict[str, Any]) -> None:
        exchange = self._exchanges[id(flat)]
        matrices = exchange.gather(ahead)
        updates = orthogonalised(list(matrices.values()), group["newton_schulz_steps"])
        exchange.scatter(dict(zip(matrices, updates, strict=True)), ahead)
        for span in exchange.spans:
            here = slice(span.offset, span.offset + span.size)
            flat[here].add_(ahead[here], alpha=-group["lr"] * update_scale(span.shape, group["update_rms"]))


def update_scale(shape: Sequence[int], update_rms: float) -> float:
    """What an orthogonal matrix is multiplied by, so that the root mean square of its elements is `update_rms`.

    An orthogonal R × C matrix has min(R, C) ones as singular values, and so a mean square of 1 / max(R, C) (arXiv
    2502.16982, lemma 1).
    """
    rows, columns = shape
    return float(update_rms * max(rows, columns) ** 0.5)


def orthogonalised(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Each matrix with its singular values brought near 1, in fp32. Matrices of one shape are worked on together."""
    found: list[Tensor | None] = [None] * len(matrices)
    by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[tuple(matrix.shape)].append(index)
    for shape, indices in by_shape.items():
        at_once = max(1, STACK_ELEMENTS // (shape[0] * shape[1]))
        for first in range(0, len(indices), at_once):
            chosen = indices[first : first + at_once]
            stack_SRC = newton_schulz(torch.stack([matrices[index] for index in chosen]), steps)
            for index, matrix_RC in zip(chosen, stack_SRC, strict=True):
                found[index] = matrix_RC
    return [matrix for matrix in found if matrix is not None]


def newton_schulz(matrices_SRC: Tensor, steps: int) -> Tensor:
    """X ← a·X + (b·XXᵀ + c·(XXᵀ)²)·X, `steps` times from X of norm 1: fp32 [S, R, C].

    Products run in bf16 on a GPU, as Jordan et al. do, and in fp32 on a CPU. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    compute = torch.bfloat16 if matrices_SRC.device.type == "cuda" else torch.float32
    tall = matrices_SRC.shape[-2] > matrices_SRC.shape[-1]
    x = matrices_SRC.mT if tall else matrices_SRC  # the smaller square is cheaper
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-30)).to(compute)
    for _ in range(steps):
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.float()
    return x.mT if tall else x


class Exchange:
    """Pieces of a flat tensor to the owners of their matrices, and back. Built and used by all ranks together."""

    def __init__(self, spans: Sequence[Span]) -> None:
        """`spans`: what this rank's flat tensor holds. A collective."""
        self.spans = spans
        self._places = {span.parameter: slice(span.offset, span.offset + span.size) for span in spans}
        assert len(self._places) == len(spans), "a rank holds one range of a matrix"
        rank, size = dist.get_rank(), dist.get_world_size()
        everybody: list[list[Part]] = [[] for _ in range(size)]
        dist.all_gather_object(everybody, [Part(span.parameter, span.shape, span.start, span.size) for span in spans])
        self._shapes = {part.matrix: part.shape for parts in everybody for part in parts}
        self.names = set(self._shapes)
        owners = choose_owners(everybody)
        self._mine = [name for name, owner in owners.items() if owner == rank]
        # What goes over the wire: for every owner the parts of its matrices that the sender holds, by name.
        self._sent = [[part for part in everybody[rank] if owners[part.matrix] == to] for to in range(size)]
        self._received = [[part for part in parts if owners[part.matrix] == rank] for parts in everybody]

    def gather(self, flat: Tensor) -> dict[str, Tensor]:
        """The matrices that this rank owns, whole, out of everybody's `flat`."""
        outgoing = [flat[self._places[part.matrix]] for parts in self._sent for part in parts]
        incoming = flat.new_empty(sum(part.size for parts in self._received for part in parts))
        self._swap(incoming, _joined(outgoing, flat), self._received, self._sent)
        matrices = {name: flat.new_empty(self._shapes[name]) for name in self._mine}
        self._walk(matrices, incoming, lambda place, wire: place.copy_(wire))
        return matrices

    def scatter(self, matrices: dict[str, Tensor], flat: Tensor) -> None:
        """The reverse: every rank's pieces of the owners' `matrices` into its `flat`."""
        outgoing = flat.new_empty(sum(part.size for parts in self._received for part in parts))
        self._walk({n: m.contiguous() for n, m in matrices.items()}, outgoing, lambda place, wire: wire.copy_(place))
        incoming = flat.new_empty(sum(part.size for parts in self._sent for part in parts))
        self._swap(incoming, outgoing, self._sent, self._received)
        start = 0
        for part in (part for parts in self._sent for part in parts):
            flat[self._places[part.matrix]].copy_(incoming[start : start + part.size])
            start += part.size

    def _walk(self, matrices: dict[str, Tensor], wire: Tensor, act: Callable[[Tensor, Tensor], object]) -> None:
        """`act(range of a matrix, its place on the wire)` for all parts of this rank's matrices, in order."""
        start = 0
        for part in (part for parts in self._received for part in parts):
            place = matrices[part.matrix].view(-1)[part.start : part.start + part.size]
            act(place, wire[start : start + part.size])
            start += part.size

    def _swap(self, into: Tensor, out_of: Tensor, taken: list[list[Part]], given: list[list[Part]]) -> None:
        sizes = [[sum(part.size for part in parts) for parts in side] for side in (taken, given)]
        dist.all_to_all_single(into, out_of, output_split_sizes=sizes[0], input_split_sizes=sizes[1])


def choose_owners(everybody: Sequence[Sequence[Part]]) -> dict[str, int]:
    """Which rank orthogonalises which matrix, from every rank's parts: one that holds the most of it, and of those the
    one with the least to do, the dearest matrices first. The same on every rank."""
    held: dict[str, dict[int, int]] = defaultdict(dict)
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, parts in enumerate(everybody):
        for part in parts:
            held[part.matrix][rank] = part.size
            shapes[part.matrix] = part.shape
    for name, by_rank in held.items():
        assert sum(by_rank.values()) == math.prod(shapes[name]), f"the ranks' parts of {name} are not the whole of it"
    work = [0] * len(everybody)
    owners: dict[str, int] = {}
    for name in sorted(held, key=lambda name: (-_operations(shapes[name]), name)):
        most = max(held[name].values())
        owner = min((rank for rank, size in held[name].items() if size == most), key=lambda rank: (work[rank], rank))
        work[owner] += _operations(shapes[name])
        owners[name] = owner
    return owners


def _operations(shape: tuple[int, ...]) -> int:
    """Of a Newton–Schulz step, to a factor that all shapes share: two products with the long side, one without."""
    short, long = min(shape), max(shape)
    return short * short * (2 * long + short)


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty(0)
