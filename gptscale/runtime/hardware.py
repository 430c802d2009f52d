"""What a device can do at best, by its name, and what this host offers. What is unknown is None, never a guess.

Peaks are dense, at boost clock and for matrix products that accumulate in fp32, as training does: datasheets print
twice as much "with sparsity", and for GeForce cards twice as much with fp16 accumulation. Sources: NVIDIA's and AMD's
datasheets and architecture papers, named below.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Device:
    """Peak FLOP/s by precision ("fp32" without, "tf32" with tensor cores), and memory bytes/s."""

    flops: dict[str, float]
    memory_bandwidth: float


def _device(bandwidth_gb: float, **teraflops: float) -> Device:
    return Device({name: value * 1e12 for name, value in teraflops.items()}, bandwidth_gb * 1e9)


_H100_SXM = {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4, "fp8": 1978.9}
_A100 = {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312}

_DEVICES: dict[str, Device] = {
    # "NVIDIA B200": HGX B200 datasheet, one of its eight.
    r"NVIDIA B200": _device(7700, fp32=75, tf32=1125, bf16=2250, fp16=2250, fp8=4500),
    # GH100: "NVIDIA H100 Tensor Core GPU Architecture" (V1.04, table 2) and the H100, H100 NVL and H200 datasheets.
    r"NVIDIA H200": _device(4800, **_H100_SXM),
    r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM5?.*": _device(3352, **_H100_SXM),
    r"NVIDIA H100 NVL": _device(3938, fp32=60, tf32=417.5, bf16=835, fp16=835, fp8=1671),
    r"NVIDIA H100 PCIe": _device(2039, fp32=51.2, tf32=378, bf16=756, fp16=756, fp8=1513),
    r"NVIDIA GH200 480GB": _device(4000, **_H100_SXM),
    # GA100: A100 datasheet (June 2021).
    r"(NVIDIA )?A100-SXM4?-80GB": _device(2039, **_A100),
    r"(NVIDIA )?A100(-PCIE-80GB| 80GB PCIe)": _device(1935, **_A100),
    r"(NVIDIA )?A100-(SXM4?|PCIE)-40GB": _device(1555, **_A100),
    # GA102 and AD102/AD104: the cards' datasheets and the Ampere GA102 and Ada architecture papers.
    r"NVIDIA A10": _device(600, fp32=31.2, tf32=62.5, bf16=125, fp16=125),
    r"NVIDIA A10G": _device(600, fp32=35, tf32=35, bf16=70, fp16=70),
    r"NVIDIA RTX A6000": _device(768, fp32=38.7, tf32=77.4, bf16=154.8, fp16=154.8),
    r"(NVIDIA )?GeForce RTX 3090": _device(936, fp32=35.6, tf32=35.6, bf16=71, fp16=71),
    r"NVIDIA L4": _device(300, fp32=30.3, tf32=60, bf16=121, fp16=121, fp8=242.5),
    r"NVIDIA L40": _device(864, fp32=90.5, tf32=90.5, bf16=181.05, fp16=181.05, fp8=362),
    r"NVIDIA L40S": _device(864, fp32=91.6, tf32=183, bf16=362.05, fp16=362.05, fp8=733),
    r"NVIDIA RTX 6000 Ada Generation": _device(960, fp32=91.1, tf32=182.1, bf16=364.25, fp16=364.25, fp8=728.5),
    r"NVIDIA GeForce RTX 4090": _device(1008, fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2, fp8=330.3),
    # GV100 and TU104: datasheets. Neither multiplies bf16 in hardware.
    r"(Tesla|NVIDIA) V100-SXM[23].*": _device(900, fp32=15.7, fp16=125),
    r"(Tesla|NVIDIA) V100-PCIE.*": _device(900, fp32=14, fp16=112),
    r"(Tesla|NVIDIA) V100S.*": _device(1134, fp32=16.4, fp16=130),
    r"(Tesla|NVIDIA) T4": _device(320, fp32=8.1, fp16=65),
    # CDNA 2 and 3: AMD Instinct datasheets. PyTorch sees each die of an MI250X by itself: half of the card's figures.
    r"AMD Instinct MI250X": _device(1638.4, fp32=23.95, bf16=191.5, fp16=191.5),
    r"AMD Instinct MI210": _device(1638.4, fp32=22.6, bf16=181, fp16=181),
    r"AMD Instinct MI300X( VF)?": _device(5300, fp32=163.4, tf32=653.7, bf16=1307.4, fp16=1307.4, fp8=2614.9),
    r"AMD Instinct MI325X( VF)?": _device(6000, fp32=163.4, tf32=653.7, bf16=1307.4, fp16=1307.4, fp8=2614.9),
}
"""By the whole of torch.cuda.get_device_name(): a slice of a card ("… MIG 1g.10gb") must not match its card."""


def find_device(name: str) -> Device | None:
    """The device of this name, None if unknown. A CPU is unknown: its peak depends on clocks that no name tells."""
    return next((device for pattern, device in _DEVICES.items() if re.fullmatch(pattern, name.strip())), None)


def peak_flops(name: str, precision: str) -> float | None:
    """Peak dense FLOP/s of one device at "fp32", "tf32", "bf16", "fp16" or "fp8"; None where unknown."""
    device = find_device(name)
    return None if device is None else device.flops.get(precision)


def memory_bandwidth(name: str) -> float | None:
    """Peak bytes/s between one device and its own memory; None where unknown."""
    device = find_device(name)
    return None if device is None else device.memory_bandwidth


@dataclass(frozen=True)
class Host:
    """What this process may use of the machine."""

    cores: int
    memory_bytes: int
    cpu: str


def describe_host() -> Host:
    return Host(cores=usable_cores(), memory_bytes=usable_memory_bytes(), cpu=_cpu_name())


def usable_cores() -> int:
    """Cores that this process may run on, and no more than its cgroup's share of them; at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = cgroup_limits().cores
    return cores if quota is None else max(1, min(cores, int(quota)))


def usable_memory_bytes() -> int:
    """Physical memory, or the cgroup's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = cgroup_limits().memory_bytes
    return physical if limit is None else min(physical, limit)


@dataclass(frozen=True)
class CgroupLimits:
    """What a container or a batch system allows; None is no limit."""

    cores: float | None
    memory_bytes: int | None


def cgroup_limits(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> CgroupLimits:
    """The tightest limits over this process's cgroups and all above them, of version 1 and 2 (kernel docs, cgroups(7)).

    Within a container `membership` may name a path of the host that is not mounted here: then what is there counts.
    """
    cores: list[float] = []
    memory: list[int] = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        for folder in _with_parents(mount, controllers, path):
            if not controllers:
                quota, _, period = _read(folder / "cpu.max").partition(" ")
                cores += [int(quota) / int(period)] if quota.isdigit() else []
                memory += _numbers(folder / "memory.max")
            if "cpu" in names:
                quotas, periods = _numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us")
                cores += [quota / period for quota, period in zip(quotas, periods, strict=False)]
            if "memory" in names:
                # "No limit" is written as the largest multiple of a page in 63 bits.
                memory += [limit for limit in _numbers(folder / "memory.limit_in_bytes") if limit < 2**62]
    return CgroupLimits(cores=min(cores, default=None), memory_bytes=min(memory, default=None))


def _with_parents(mount: Path, controllers: str, path: str) -> list[Path]:
    """Folders of one hierarchy, from the process's own up to the mount. Version 2 is `mount` or `mount/unified`."""
    roots = [mount / controllers] if controllers else [mount, mount / "unified"]
    inner = Path(path.lstrip("/"))
    return [root / part for root in roots for part in (inner, *inner.parents) if (root / part).is_dir()]


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _numbers(path: Path) -> list[int]:
    """One non-negative number, or none: `max` and -1 are "no limit"."""
    text = _read(path)
    return [int(text)] if text.isdigit() else []


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return os.uname().machine
