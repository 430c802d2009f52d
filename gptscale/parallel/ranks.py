"""The processes of a run, as everything above the engines sees them: who am I, do all agree, sums of small numbers."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from gptscale.runtime.errors import UserError
from gptscale.runtime.process import ProcessInfo
from gptscale.topology import Coordinates, Topology


@dataclass(frozen=True)
class Group:
    """Ranks that work together, and this one's place among them."""

    rank: int
    size: int
    handle: torch.distributed.ProcessGroup | None
    """None of all ranks: the default group, where there is one."""

    @property
    def process_group(self) -> torch.distributed.ProcessGroup:
        """For those who want it named."""
        group = torch.distributed.group.WORLD if self.handle is None else self.handle
        assert group is not None
        return group


class Ranks:
    """This process among its peers. With one process and no engine that needs it, there is no process group."""

    def __init__(
        self, process: ProcessInfo, deepspeed: bool, timeout_s: float, topology: Topology | None = None
    ) -> None:
        self.rank = process.rank
        self.size = process.world_size
        self.topology = Topology(self.size) if topology is None else topology
        assert self.topology.world_size == self.size
        self.at = self.topology.coordinates(self.rank)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            index = choose_gpu(process, torch.cuda.device_count())
            os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed's word for the GPU it takes
            torch.cuda.set_device(index)
            self.device = torch.device("cuda", index)
        self._control: torch.distributed.ProcessGroup | None = None
        if deepspeed:
            start_deepspeed(timeout_s)
        elif self.size > 1:
            raise ValueError("more than one rank needs an engine that talks: parallel.engine=deepspeed")
        if torch.distributed.is_initialized():
            # Control words travel on their own gloo group, so that agreeing never waits for a GPU's queue.
            self._control = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._timeout_s = timeout_s
        self._made: dict[tuple[int, ...], torch.distributed.ProcessGroup] = {}
        self.replicas = self._group(lambda at: (at.pipeline, at.tensor))
        """The ranks that hold the same part of the model: gradients are summed over them."""
        self.tensor = self._group(lambda at: (at.pipeline, at.data, at.sequence))
        """The ranks that share every product of this one's."""
        self.sequence = self._group(lambda at: (at.pipeline, at.data, at.tensor))
        """The ranks that share this one's rows."""
        self.pipeline = self._group(lambda at: (at.data, at.sequence, at.tensor))
        """The stages before and after this one."""
        ends = (0, self.topology.pipeline - 1)
        self.ends = self.pipeline
        """The first and the last of these stages; of one in between, itself."""
        if self.topology.pipeline > 2:
            self.ends = self._group(
                lambda at: (at.data, at.sequence, at.tensor, -1 if at.pipeline in ends else at.pipeline), anew=True
            )
        self.model = self._group(lambda at: (at.data, at.sequence))
        """The ranks that hold the parts of one copy of the model."""
        experts = self.topology.expert
        self.expert = self._group(lambda at: (at.pipeline, at.sequence, at.tensor, at.data // experts))
        """The ranks that share out the experts: neighbours among the replicas."""
        self.expert_replicas = self._group(lambda at: (at.pipeline, at.tensor, at.data % experts))
        """The ranks that hold the same experts."""

    def _group(self, key: Callable[[Coordinates], Hashable], anew: bool = False) -> Group:
        """This rank's group, where those of equal keys are one. Every rank makes one for the same key.

        Members wait for one another alone, or a start would take longer with every rank of the run. But NCCL makes all
        groups of a key at once, by splitting the group of all ranks: nobody may be left out, and so groups whose sizes
        differ are made `anew`, though some rank may have had such a one.
        """
        own = tuple(r for r in range(self.size) if key(self.topology.coordinates(r)) == key(self.at))
        return Group(own.index(self.rank), len(own), self._group_of(own, anew) if len(own) < self.size else None)

    def _group_of(self, members: tuple[int, ...], anew: bool) -> torch.distributed.ProcessGroup:
        if anew or members not in self._made:
            limit = timedelta(seconds=self._timeout_s)
            self._made[members] = torch.distributed.new_group(
                list(members), timeout=limit, use_local_synchronization=True
            )
        return self._made[members]

    @property
    def has_parts(self) -> bool:
        """Whether some parameter is not whole on this rank, ZeRO aside."""
        return self.model.size * self.expert.size > 1

    @property
    def feeds(self) -> bool:
        """Whether this rank speaks for the samples of its data coordinate, which others read too."""
        return self.at.tensor == self.at.sequence == self.at.pipeline == 0

    def sum_fed(self, values: Sequence[int]) -> list[int]:
        """`sum` of what belongs to samples, each counted once. A collective."""
        return self.sum([value if self.feeds else 0 for value in values])

    def sum(self, values: Sequence[int]) -> list[int]:
        """Sums over all ranks, modulo 2⁶⁴. A collective."""
        if self.size == 1:
            return [value % 2**64 for value in values]
        signed = [(value + 2**63) % 2**64 - 2**63 for value in values]
        total = torch.tensor(signed, dtype=torch.int64)
        torch.distributed.all_reduce(total, group=self._control)  # int64 wraps, which is the sum modulo 2⁶⁴
        return [int(value) % 2**64 for value in total]

    def agree(self, ok: bool) -> bool:
        """True where every rank says true. A collective, and so a barrier."""
        return self.sum([0 if ok else 1])[0] == 0

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a small device tensor over the replicas, in place: tensor peers hold the same. A collective."""
        if self.replicas.size > 1:
            torch.distributed.all_reduce(values, group=self.replicas.handle)
        return values

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def choose_gpu(process: ProcessInfo, visible: int) -> int:
    """Index of this rank's GPU among the `visible` ones; UserError, on every rank of the host, if they are too few.

    Most launchers show a rank all GPUs of its host. `srun --gpus-per-task=1` shows each its own alone, as number 0.
    """
    if process.launcher == "slurm" and visible == 1:
        return 0
    if process.local_world_size > visible:
        raise UserError(
            f"{process.local_world_size} ranks on a host where each sees {visible} GPUs\n"
            "start one rank a GPU (srun: --gpus-per-node=N with --ntasks-per-node=N), or train on the CPU: "
            "CUDA_VISIBLE_DEVICES="
        )
    return process.local_rank


def start_deepspeed(timeout_s: float) -> None:
    """Import DeepSpeed and open the process group, without compiling anything on a CPU.

    On the CPU accelerator `init_distributed` builds a shared-memory all-reduce with g++ at every first start (two
    minutes on a loaded machine, and segments left in /dev/shm by killed jobs). gloo does the same work uncompiled, so
    the builder is taken out. It lives in the module `deepspeed.comm.torch`, which the attribute of that name hides.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # found all the same, but with a warning
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch renames its collectives now and then, and says so at every call of the old names, which are DeepSpeed's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if not torch.cuda.is_available():
        sys.modules["deepspeed.utils.nvtx"].__dict__["enable_nvtx"] = False  # wraps every hook, for a profiler of GPUs
        setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # noqa: B010 (mypy knows no such name)
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(seconds=timeout_s),
        auto_mpi_discovery=False,
        verbose=False,
    )
