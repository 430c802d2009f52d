"""When memory runs out: what held it, a snapshot on a GPU, and which setting to change.

The error becomes a UserError, so the exit code is 2: settings that do not fit a device are the user's to change, and
starting the same run again would end the same way. Other ranks lose a peer and end with it.
"""

from __future__ import annotations

import errno
import gc
import mmap
import re
import resource
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptscale.config.schema import TrainRoot
from gptscale.flow import Piece
from gptscale.parallel.engine import Engine
from gptscale.parallel.ranks import Ranks
from gptscale.runtime.errors import OutOfMemoryError
from gptscale.runtime.files import write_bytes_atomically
from gptscale.runtime.hardware import usable_memory_bytes
from gptscale.train.memory_advice import Fix, Moment, Shortage, advice, readable

FOLDER = "oom"
ROWS = 5
"""Largest holders of a kind that are named."""
HISTORY_ENTRIES = 100_000
"""Allocations that are remembered: the last two or three steps of a large model, some hundred MB of host memory."""

RESERVE_BYTES = 16 * 2**20
"""Address space that is given back to say what happened. It is never touched, so it takes no memory."""

_NO_MEMORY = re.compile(
    r"can't allocate memory"  # torch's allocator on the CPU, a RuntimeError
    r"|std::bad_alloc"
    r"|CUDA error: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED"
    r"|(?:CUDA|HIP) out of memory"
)
_ASKED = (
    (re.compile(r"tried to allocate (\d+) bytes"), None),
    (re.compile(r"(?:Tried|Unable) to allocate ([\d.]+) ([KMGT]?i?B)"), {"K": 1, "M": 2, "G": 3, "T": 4}),
)
_MOMENTS: dict[str, tuple[Moment, str]] = {
    "one_step": ("step", "in a training step"),
    "evaluate": ("evaluation", "in an evaluation"),
    "save_run": ("save", "in a save"),
    "build_model": ("start", "while the model was made"),
    "build_engine": ("start", "while the engine was made"),
    "resume": ("start", "while the checkpoint was loaded"),
}
"""Functions of the training loop, as a traceback names them."""


class MemoryHelp:
    """One rank's. `engine` is set once there is one with all of its state."""

    def __init__(self, settings: TrainRoot, run_dir: Path, ranks: Ranks) -> None:
        self._settings = settings
        self._run_dir = run_dir
        self._ranks = ranks
        self._reserve = mmap.mmap(-1, RESERVE_BYTES)
        self.engine: Engine | None = None
        if settings.profile.memory_history and ranks.device.type == "cuda":
            # Python's stacks only: with C++ frames a snapshot takes minutes to write.
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=HISTORY_ENTRIES)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error for want of memory into an OutOfMemoryError; others pass."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._reserve.close()
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> OutOfMemoryError:
        rank = self._ranks.rank
        moment, when = find_moment(error)
        asked = asked_bytes(str(error))
        what = f"rank {rank} ran out of memory {when}" + ("" if asked is None else f": {readable(asked)} more")
        page = self._run_dir / FOLDER / f"rank-{rank}.txt"
        try:
            holders = find_holders([] if self.engine is None else self.engine.pieces(), self._ranks.device)
            shortage = Shortage(
                moment=moment,
                ranks=self._ranks.size,
                state_bytes=holders.state_bytes,
                rest_bytes=max(0, holders.total_bytes - holders.state_bytes),
                asked_bytes=asked,
                unused_bytes=holders.unused_bytes,
                on_gpu=self._ranks.device.type == "cuda",
            )
            fixes = advice(self._settings, shortage)
            page.parent.mkdir(parents=True, exist_ok=True)
            notes = dump_snapshot(page.with_suffix(".snapshot.pickle"), self._ranks.device, self._settings)
            text = write_page(what, str(error), holders, fixes, notes)
            write_bytes_atomically(page, text.encode())
            where = f"; what held it: {page}"
            held = f" than the {readable(holders.total_bytes)} it holds" if asked is not None else ""
        except Exception as second:  # there may be no memory left to say more, or no disk
            fixes = advice(self._settings, Shortage(moment, self._ranks.size, 0, 0, asked))
            where, held = f" (no page was written: {type(second).__name__}: {second})".splitlines()[0], ""
        tries = ", then ".join(fix.setting for fix in fixes[:3])
        return OutOfMemoryError(f"{what}{held}\ntry {tries}{where}")


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def asked_bytes(message: str) -> int | None:
    """How much could not be allocated, where the message says it."""
    for pattern, powers in _ASKED:
        if found := pattern.search(message):
            return int(found[1]) if powers is None else int(float(found[1]) * 1024 ** powers.get(found[2][0], 0))
    return None


def find_moment(error: BaseException) -> tuple[Moment, str]:
    """What the training loop was about, told from the traceback."""
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((_MOMENTS[name] for name in reversed(names) if name in _MOMENTS), ("start", "at the start"))


@dataclass(frozen=True)
class Holder:
    kind: str
    name: str
    held_bytes: int


@dataclass(frozen=True)
class Holders:
    """Bytes of one device (a GPU, or this process's memory) by what they are for."""

    kinds: dict[str, int]
    """weights, gradients, optimizer state, other tensors that Python sees: each storage once."""
    largest: tuple[Holder, ...]
    total_bytes: int
    """Allocated on the GPU; resident in memory on a CPU."""
    limits: tuple[str, ...]
    """What there is at all, in words."""
    unused_bytes: int = 0

    @property
    def state_bytes(self) -> int:
        return sum(self.kinds[kind] for kind in ("weights", "gradients", "optimizer state"))


def find_holders(pieces: list[Piece], device: torch.device) -> Holders:
    """Every tensor that Python can reach, by kind. What autograd alone keeps is the difference to the total."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor) and plain_on(found, device)]
    parameters = [tensor for tensor in tensors if issubclass(type(tensor), torch.nn.Parameter)]
    gradients = [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    claimed: set[int] = set()
    rows: list[Holder] = []

    def claim(kind: str, named: list[tuple[str, Tensor]]) -> int:
        total = 0
        for name, tensor in named:
            storage = tensor.untyped_storage()
            address = address_of(storage)
            if address is not None and address not in claimed and storage.nbytes():
                claimed.add(address)
                total += storage.nbytes()
                rows.append(Holder(kind, name, storage.nbytes()))
        return total

    weights = [(name_of(piece), piece.values) for piece in pieces if piece.kind == "weight"]
    states = [(name_of(piece), piece.values) for piece in pieces if piece.kind != "weight"]
    kinds = {
        "weights": claim("weights", [*weights, *((shape_of(tensor), tensor) for tensor in parameters)]),
        "gradients": claim("gradients", [(shape_of(grad), grad) for grad in gradients if plain_on(grad, device)]),
        "optimizer state": claim("optimizer state", states),
        "other tensors": claim("other tensors", [(shape_of(tensor), tensor) for tensor in tensors]),
    }
    total, unused, limits = device_memory(device)
    rows.sort(key=lambda row: -row.held_bytes)
    largest = [row for kind in kinds for row in [row for row in rows if row.kind == kind][:ROWS]]
    return Holders(kinds, tuple(largest), total, limits, unused)


def address_of(storage: torch.UntypedStorage) -> int | None:
    """None: of a tensor that a compiler traced with, which has a shape and no memory, or says that it has none."""
    if storage.device.type == "meta":
        return None
    try:
        return storage.data_ptr()
    except RuntimeError:
        return None


def plain_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device == device and tensor.layout == torch.strided


def name_of(piece: Piece) -> str:
    """Flat buffers carry many parameters: the first names them."""
    whole = piece.values.untyped_storage().nbytes() == piece.values.nbytes
    return f"{piece.parameter} {piece.kind}" + ("" if whole else " and more in one buffer")


def shape_of(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def device_memory(device: torch.device) -> tuple[int, int, tuple[str, ...]]:
    """(bytes in use, bytes reserved and unused, what there is at all in words)."""
    if device.type == "cuda":
        free, size = torch.cuda.mem_get_info(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        foreign = max(0, size - free - reserved)
        return (
            allocated,
            reserved - allocated,
            (
                f"the GPU has {readable(size)}, {readable(free)} free",
                f"torch has reserved {readable(reserved)}, at most {readable(torch.cuda.max_memory_reserved(device))}",
                f"outside of torch's allocator (context, NCCL, other processes): {readable(foreign)}",
            ),
        )
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    limits = [f"this machine, or its cgroup, has {readable(usable_memory_bytes())} for all of its processes"]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(f"this process may map {readable(address_space)} (ulimit -v)")
    return resident, 0, tuple(limits)


def dump_snapshot(path: Path, device: torch.device, settings: TrainRoot) -> list[str]:
    """On a GPU, torch's picture of the allocator, for https://pytorch.org/memory_viz; returns what to say about it."""
    if device.type != "cuda":
        return []
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    notes = [f"every block of the allocator: {path}, to be dropped on https://pytorch.org/memory_viz"]
    if not settings.profile.memory_history:
        notes.append("with profile.memory_history=true it also knows which line of code made each block")
    return notes


def write_page(what: str, error: str, holders: Holders, fixes: list[Fix], notes: list[str]) -> str:
    seen = sum(holders.kinds.values())
    kinds = {**holders.kinds, "the rest: activations, buffers, libraries": max(0, holders.total_bytes - seen)}
    lines = [
        what,
        *(f"  {line}" for line in error.strip().splitlines()[:3]),
        "",
        f"in use: {readable(holders.total_bytes)}",
        *(f"  {limit}" for limit in holders.limits),
        "",
        "held by kind",
        *(f"  {readable(size):>12}  {size / (holders.total_bytes or 1):6.1%}  {kind}" for kind, size in kinds.items()),
        "",
        "largest holders",
        *(f"  {readable(row.held_bytes):>12}  {row.kind}: {row.name}" for row in holders.largest),
        "",
        "what to change, in this order",
        *(f"  {fix.setting}: {fix.effect}" for fix in fixes),
    ]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"
