"""ZeRO-Offload (Ren et al., arXiv 2101.06840): fp32 masters and optimizer state on the host, which also updates them.

A GPU keeps weights, gradients and activations. A step sends it a rank's share of the gradients, torch's fused AdamW of
the CPU updates the share, and the new weights go back. On disk the same tensors are a file that is mapped into memory,
in place of DeepSpeed's own way there, which compiles against libaio: the kernel reads ahead and writes back. The file
has no name, so that nothing is left of it however the process ends.

A step waits for the norm of the gradients: it is the host that has to clip.
"""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor

from gptscale.config.schema import ParallelConfig
from gptscale.flow import StateKind
from gptscale.runtime.errors import UserError


class Host:
    """Memory for what is offloaded."""

    def __init__(self, folder: str | None, pinned: bool) -> None:
        """On disk, in `folder`, or in main memory: `pinned`, what a GPU copies to and from."""
        self._folder, self._pinned = folder, pinned

    def copy_of(self, tensor: Tensor) -> Tensor:
        """That goes back and forth."""
        return self.zeros(tensor.numel(), self._pinned).copy_(tensor)

    def zeros(self, elements: int, pinned: bool = False) -> Tensor:
        """fp32. Raises UserError where the disk has no room for it."""
        if self._folder is None:
            return torch.zeros(elements, pin_memory=pinned)
        size = max(elements, 1) * torch.float32.itemsize
        try:
            descriptor, path = tempfile.mkstemp(prefix="gptscale-offload-", dir=self._folder)
            try:
                os.posix_fallocate(descriptor, 0, size)  # or the kernel kills whoever writes to a full disk
                return torch.from_file(path, shared=True, size=elements, dtype=torch.float32)
            finally:
                os.close(descriptor)
                os.unlink(path)
        except OSError as error:
            raise UserError(
                f"parallel.offload_path={self._folder}: no room for {size:,} bytes there ({error.strerror})\n"
                "give a folder on a disk with space for 12 bytes a parameter, or parallel.offload=cpu"
            ) from error


def host_for(parallel: ParallelConfig, device: torch.device) -> Host | None:
    """Where these settings keep what they offload; None where they do not."""
    if parallel.offload == "none":
        return None
    return Host(parallel.offload_path if parallel.offload == "nvme" else None, device.type == "cuda")


def move_to_host(optimizer: torch.optim.Optimizer, master: Tensor, kinds: tuple[StateKind, ...], host: Host) -> None:
    """Give a flat master, and the state that the optimizer will keep of it, memory on the host."""
    assert not optimizer.state.get(master), "it has been stepped already"
    master.data = host.copy_of(master.data)
    state = {kind: host.zeros(master.numel()) for kind in kinds}
    optimizer.state[master] = {"step": torch.zeros(()), **state}
