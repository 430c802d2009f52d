"""The communication logger: each operation counts once, whoever asks for it. Two real ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from gptscale.bench.traffic import TrafficCounter
from tests.helpers import ranks


def operations(rank: int) -> dict[str, tuple[Callable[[], object], dict[str, int]]]:
    """What is called, and what it counts as. Tensors are of ten fp32 numbers, or of ten a rank."""
    peer = 1 - rank

    def ten() -> Tensor:
        return torch.ones(10)

    def twenty() -> Tensor:
        return torch.ones(20)

    def exchange() -> None:
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, ten(), peer), dist.P2POp(dist.irecv, ten(), peer)]):
            work.wait()

    def in_turn() -> None:
        for step in (dist.send, dist.recv) if rank == 0 else (dist.recv, dist.send):
            step(ten(), peer)

    def coalesced() -> None:
        with dist._coalescing_manager():
            dist.all_reduce(ten())
            dist.all_reduce(ten())

    def sharded_norm() -> None:
        mesh = init_device_mesh("cpu", (2,))
        torch.linalg.vector_norm(DTensor.from_local(ten(), mesh, [Shard(0)])).full_tensor()

    halves = [torch.empty(10), torch.empty(10)]
    return {
        "all_reduce": (lambda: dist.all_reduce(ten()), {"all-reduce": 40}),
        "reduce": (lambda: dist.reduce(ten(), dst=0), {"reduce": 40}),
        "all_reduce, in fp64": (lambda: dist.all_reduce(ten().double()), {"all-reduce": 80}),
        "all_reduce, later": (lambda: dist.all_reduce(ten(), async_op=True).wait(), {"all-reduce": 40}),
        "all_reduce_coalesced": (lambda: dist.all_reduce_coalesced([ten(), ten()]), {"all-reduce": 80}),
        "all_reduce, together": (coalesced, {"all-reduce": 80}),
        "all_reduce, within a distributed tensor": (sharded_norm, {"all-reduce": 4}),
        "all_gather": (lambda: dist.all_gather(halves, ten()), {"all-gather": 80}),
        "all_gather_into_tensor": (lambda: dist.all_gather_into_tensor(twenty(), ten()), {"all-gather": 80}),
        "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(ten(), twenty()), {"reduce-scatter": 80}),
        "reduce_scatter": (lambda: dist.reduce_scatter(ten(), [ten(), ten()]), {"reduce-scatter": 80}),
        "all_to_all_single": (lambda: dist.all_to_all_single(twenty(), twenty()), {"all-to-all": 80}),
        "broadcast": (lambda: dist.broadcast(ten(), 0), {"broadcast": 40}),
        "send and receive": (in_turn, {"send": 40}),
        "both at once": (exchange, {"send": 40}),
        "barrier": (dist.barrier, {}),
    }


def count_operations() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    counted = {}
    for name, (call, expected) in operations(rank).items():
        with TrafficCounter() as counter:
            call()
        counted[name] = {f"{operation} of {size}": count for (operation, size), count in counter.counted().items()}
        assert counted[name] == {f"{operation} of 2": count for operation, count in expected.items()}, name
    alone = dist.new_group([rank], use_local_synchronization=True)
    with TrafficCounter() as counter:
        dist.all_reduce(torch.ones(10))
        dist.all_reduce(torch.ones(10), group=alone)  # stays where it is
    dist.all_reduce(torch.ones(10))  # outside: not counted
    assert counter.counted() == {("all-reduce", 2): 40}
    try:
        with TrafficCounter():
            dist.gather(torch.ones(10), [torch.empty(10), torch.empty(10)] if rank == 0 else None)
    except NotImplementedError as error:
        counted["unknown"] = str(error)
    Path(f"{rank}.json").write_text(json.dumps(counted))


def test_each_operation_counts_once(tmp_path: Path) -> None:
    ranks.run(count_operations, [], 2, tmp_path)
    for rank in range(2):
        counted = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(counted) == len(operations(rank)) + 1
        assert counted["unknown"].startswith("c10d.gather_.default: nobody has said what it sends")
