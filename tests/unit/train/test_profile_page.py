"""The page of a profile, from traces small enough to work out by hand; a GPU's among them."""

from __future__ import annotations

from dataclasses import replace

from gptscale.train.profile_page import Event, Gap, Operator, advice, analyse, write_page


def on_host(name: str, start: int, end: int, correlation: int = 0, lane: int = 1) -> Event:
    return Event(name, start, end, lane, correlation=correlation)


def named(name: str, start: int, end: int) -> Event:
    return Event(name, start, end, 1, is_range=True)


def kernel(name: str, start: int, end: int, correlation: int, stream: int = 7) -> Event:
    return Event(name, start, end, stream, on_device=True, correlation=correlation)


STEP = [
    named("step 10", 0, 1000),
    named("data wait", 10, 60),
    named("train step", 100, 900),
    named("backward", 300, 500),
    named("backward", 600, 700),
]
HOST = [
    on_host("aten::linear", 110, 200),
    on_host("aten::addmm", 120, 190),
    on_host("AddmmBackward0", 310, 490),
    on_host("aten::mm", 320, 400),
    on_host("aten::mm", 610, 690),
    on_host("optimizer", 750, 800),
    on_host("before the window", -50, -10),
]


def test_phases_fill_the_step_and_self_times_the_operators() -> None:
    figures = analyse([*STEP, *HOST])
    assert figures.step_ns == (1000,)
    assert figures.phase_ns == {"data wait": 50, "forward": 300, "backward": 300, "update": 200, "rest": 150}
    assert figures.operators == (
        Operator("aten::mm", 2, 160),
        Operator("AddmmBackward0", 1, 100),
        Operator("aten::addmm", 1, 70),
        Operator("optimizer", 1, 50),
        Operator("aten::linear", 1, 20),
    )
    assert figures.gaps[:2] == (Gap(200, "step 10", "optimizer"), Gap(120, "step 10", "AddmmBackward0"))
    assert figures.device_busy is None
    assert figures.memory_peak_bytes is None


def test_threads_do_not_nest_in_each_other() -> None:
    other = on_host("copy", 130, 180, lane=2)
    assert Operator("aten::addmm", 1, 70) in analyse([*STEP, *HOST, other]).operators


def test_kernels_belong_to_the_phase_that_launched_them() -> None:
    """The host is ahead: a kernel launched in forward may run while the host is in backward or at the step's end."""
    launches = [on_host("cudaLaunchKernel", 150, 155, 1), on_host("cudaLaunchKernel", 350, 355, 2, lane=9)]
    late = [on_host("cudaLaunchKernel", 710, 715, 3), on_host("cudaLaunchKernel", 950, 955, 4)]
    kernels = [
        kernel("gemm", 320, 420, 1),
        kernel("gemm_backward", 430, 630, 2),
        kernel("ncclDevKernel_AllReduce", 600, 700, 5, stream=8),
        kernel("adamw", 720, 760, 3),
        kernel("copy", 960, 980, 4),
    ]
    figures = analyse([*STEP, *HOST, *launches, *late, *kernels])
    assert figures.device_phase_ns == {"data wait": 0, "forward": 100, "backward": 300, "update": 40, "rest": 20}
    assert figures.device_busy == (100 + 270 + 40 + 20) / 1000
    assert figures.gaps[0] == Gap(320, "step 10", "the step's start")
    assert figures.communication == 100 / 460
    page = write_page(figures, "rank 0 of 8, cuda:0")
    assert "the device is busy 43.0% of the time" in page
    assert "kernels by the phase that launched them" in page
    assert any("raise train.micro_batch" in line for line in advice(figures))
    assert any("is communication" in line for line in advice(figures))


def test_memory_is_a_running_sum() -> None:
    changes = [
        Event("[memory]", at, at, 1, allocated_bytes=size) for at, size in ((5, 100), (6, 50), (7, -100), (8, 20))
    ]
    assert analyse([*STEP, *HOST, *changes]).memory_peak_bytes == 150


def test_advice_follows_the_figures() -> None:
    calm = analyse([*STEP, *HOST])
    phases = {"data wait": 0, "forward": 350, "backward": 600, "update": 50, "rest": 0}
    calm = replace(calm, phase_ns=phases, operators=(Operator("aten::mm", 2, 10), Operator("aten::add", 2, 5)))
    assert advice(calm) == ["67% of the time is in one operator, aten::mm: what is gained there counts"]
    waiting = replace(calm, phase_ns={**phases, "data wait": 60})
    assert advice(waiting)[0].startswith("batches come late")
    updating = replace(calm, phase_ns={**phases, "update": 300})
    assert advice(updating)[0].startswith("the update is a large share")
    late = replace(calm, gaps=(Gap(90, "step 10", "c10d::allreduce_"),))
    assert advice(late)[0].startswith("after c10d::allreduce_ a rank waits for others")
