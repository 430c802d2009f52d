"""Device names, and the limits of containers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptscale.runtime.hardware import (
    CgroupLimits,
    cgroup_limits,
    describe_host,
    memory_bandwidth,
    peak_flops,
    usable_cores,
)


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989.4),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA A10", "bf16", 125),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_devices(name: str, precision: str, teraflops: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "fp32"),
        ("", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA A1000", "bf16"),
        ("NVIDIA Z999", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("Tesla T4", "tf32"),
    ],
)
def test_unknown_is_none_and_never_a_guess(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_bandwidth() -> None:
    assert memory_bandwidth("NVIDIA H200") == pytest.approx(4.8e12)
    assert memory_bandwidth("cpu") is None


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_cgroup_2_takes_the_tightest_of_all_levels(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "fs/a/b/cpu.max": "250000 100000",
            "fs/a/cpu.max": "max 100000",
            "fs/a/b/memory.max": "max",
            "fs/a/memory.max": "1073741824",
            "self": "0::/a/b",
        },
    )
    assert cgroup_limits(tmp_path / "fs", tmp_path / "self") == CgroupLimits(cores=2.5, memory_bytes=2**30)


def test_cgroup_1_and_a_path_of_the_host(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "fs/cpu,cpuacct/cpu.cfs_quota_us": "400000",
            "fs/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "fs/memory/memory.limit_in_bytes": "9223372036854771712",
            "self": "4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n1:name=systemd:/x",
        },
    )
    assert cgroup_limits(tmp_path / "fs", tmp_path / "self") == CgroupLimits(cores=4.0, memory_bytes=None)


def test_no_cgroups_no_limits(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, tmp_path / "none") == CgroupLimits(None, None)
    write(tmp_path, {"fs/cpu/cpu.cfs_quota_us": "-1", "fs/cpu/cpu.cfs_period_us": "100000", "self": "3:cpu:/"})
    assert cgroup_limits(tmp_path / "fs", tmp_path / "self") == CgroupLimits(None, None)


def test_this_host() -> None:
    host = describe_host()
    assert 1 <= host.cores <= (os.cpu_count() or 1)
    assert host.memory_bytes > 2**28
    assert host.cpu


COUNT = "from gptscale.runtime.hardware import usable_cores; print(usable_cores())"


def test_affinity_counts() -> None:
    one = min(os.sched_getaffinity(0))
    code = "import os, sys; os.sched_setaffinity(0, [int(sys.argv[1])]); " + COUNT
    done = subprocess.run([sys.executable, "-c", code, str(one)], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert usable_cores() >= 1
