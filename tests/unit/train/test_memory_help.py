"""Which errors are a shortage of memory, what was asked for, and who holds what."""

from __future__ import annotations

import errno

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gptscale.flow import Piece
from gptscale.train.memory_help import asked_bytes, find_holders, find_moment, is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes. Error code 12 (Cannot allocate memory)"  # noqa: E501
CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is free."
)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (RuntimeError(CPU.format(4096)), 4096),
        (torch.OutOfMemoryError(CUDA), 3 * 2**29),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), 20 * 2**20),
        (MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,)"), 2**33),
        (MemoryError(), None),
        (RuntimeError("std::bad_alloc"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (RuntimeError("CUDA error: out of memory"), None),
    ],
)
def test_a_shortage_is_known_by_its_words(error: Exception, asked: int | None) -> None:
    assert is_out_of_memory(error)
    assert asked_bytes(str(error)) == asked


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space left"), ValueError("can't allocate memory")],
)
def test_other_errors_are_none(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_moment_is_told_from_the_traceback() -> None:
    def one_step() -> None:
        raise MemoryError

    def resume() -> None:
        one_step()

    for function, moment in ((resume, "step"), (one_step, "step"), (int, "start")):
        with pytest.raises((MemoryError, TypeError)) as raised:
            function(*([None] if function is int else []))  # type: ignore[operator]
        assert find_moment(raised.value)[0] == moment


def test_every_storage_is_counted_once_and_by_its_kind() -> None:
    device = torch.device("cpu")
    before = find_holders([], device)
    n = 1_000_000  # more than tests before this one leave behind
    flat = torch.zeros(3 * n)
    first, second = torch.nn.Parameter(flat[:n].view(100, -1)), torch.nn.Parameter(flat[n:])
    moments = torch.zeros(3 * n)
    batch = torch.zeros(77, 11)
    with FakeTensorMode():
        traced = torch.zeros(10**12)
    functional = torch._to_functional_tensor(batch)  # both are left behind by `torch.compile`
    first.grad = torch.zeros_like(first)
    pieces = [
        Piece("a", "weight", (100, n // 100), 0, flat[:n]),
        Piece("b", "weight", (2 * n,), 0, flat[n:]),
        Piece("a", "exp_avg", (100, n // 100), 0, moments[:n]),
        Piece("b", "exp_avg", (2 * n,), 0, moments[n:]),
    ]
    after = find_holders(pieces, device)
    grown = {kind: after.kinds[kind] - before.kinds[kind] for kind in after.kinds}
    assert grown["weights"] == grown["optimizer state"] == 3 * n * 4
    assert grown["gradients"] == n * 4
    assert batch.nbytes <= grown["other tensors"] < traced.nbytes
    assert ("weights", "a weight and more in one buffer", 3 * n * 4) in [
        (row.kind, row.name, row.held_bytes) for row in after.largest
    ]
    assert after.total_bytes > sum(grown.values())
    assert second.grad is None
    assert functional.shape == batch.shape
