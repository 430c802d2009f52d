"""Every attention kernel of this GPU against float64, for whoever has one. Run by `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from gptscale.model.attention import attend
from gptscale.model.documents import Documents
from gptscale.model.kernel_timing import Heads, time_kernels
from gptscale.model.kernels import Case, able
from tests.helpers.attention import check_kernel, packed, random_qkv

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(window: int | None, documents: bool, dtype: torch.dtype) -> None:
    for tokens in (20, 300, 512):
        reach = None if window is None or window >= tokens else window
        kernels = able(Case(CUDA, dtype, tokens, 64, 0.0, reach, documents))
        print(dtype, tokens, window, documents, kernels)
        for kernel in kernels:
            check_kernel(kernel, tokens, window, documents, width=64, dtype=dtype, device="cuda")


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("documents", [False, True])
def test_memory_does_not_grow_with_the_square(window: int | None, documents: bool) -> None:
    for kernel in able(Case(CUDA, torch.bfloat16, 4096, 64, 0.0, window, documents)):
        peaks = []
        for tokens in (1024, 4096):
            q, k, v = random_qkv(1, tokens, 4, 4, 64, torch.bfloat16, "cuda")
            within = Documents(packed([tokens // 16] * 8 + [tokens // 2]), CUDA) if documents else None
            for _ in range(2):  # once to compile
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                attend(q, k, v, 0.0, kernel, window, documents=within).sum().backward()
                peaks.append(torch.cuda.max_memory_allocated() - before)
        assert peaks[3] < 6 * peaks[1], kernel
        assert peaks[3] < 4 * 4096 * 4096 * 2, kernel


def test_all_are_sound_and_timed() -> None:
    for documents in (False, True):
        case = Case(CUDA, torch.bfloat16, 1024, 64, 0.0, None, documents)
        reports: list[str] = []
        starts_BT = packed([24, 1000], [512, 512]) if documents else None
        times_s = time_kernels(able(case), case, Heads(8, 4, 64), 4, starts_BT, 2.0, reports.append)
        print({name: f"{1000 * seconds:.3f} ms" for name, seconds in times_s.items()})
        assert not reports
        assert set(times_s) == set(able(case))
