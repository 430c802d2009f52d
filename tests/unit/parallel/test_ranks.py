from __future__ import annotations

from dataclasses import replace

import pytest

from gptscale.parallel.ranks import choose_gpu
from gptscale.runtime.errors import UserError
from gptscale.runtime.process import ALONE, Launcher, ProcessInfo


def on_host(local_rank: int, local_world_size: int, launcher: Launcher) -> ProcessInfo:
    return replace(
        ALONE, local_rank=local_rank, local_world_size=local_world_size, world_size=local_world_size, launcher=launcher
    )


@pytest.mark.parametrize("launcher", ["gptscale", "torchrun", "deepspeed", "slurm"])
def test_a_rank_takes_the_gpu_of_its_number(launcher: Launcher) -> None:
    assert [choose_gpu(on_host(rank, 4, launcher), visible=4) for rank in range(4)] == [0, 1, 2, 3]


def test_srun_may_show_each_rank_its_own_gpu_alone() -> None:
    assert [choose_gpu(on_host(rank, 4, "slurm"), visible=1) for rank in range(4)] == [0] * 4


@pytest.mark.parametrize(("launcher", "visible"), [("gptscale", 1), ("torchrun", 1), ("slurm", 2)])
def test_fewer_gpus_than_ranks_are_refused_on_every_rank(launcher: Launcher, visible: int) -> None:
    for rank in range(4):
        with pytest.raises(UserError, match="4 ranks on a host") as raised:
            choose_gpu(on_host(rank, 4, launcher), visible)
        assert str(raised.value).count("\n") == 1
