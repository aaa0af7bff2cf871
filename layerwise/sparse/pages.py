"""Memory in huge pages, for arrays that stream by once per token."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in memory that the system is asked to have in huge pages.

    In pages of 4 kB an address has to be looked up anew after every 64 cache lines, which is slow on virtual machines.
    torch asks for huge pages only where ``THP_MEM_ALLOC_ENABLE`` is set. A copy of the copy is ordinary memory again.

    Args:
        tensor: on the CPU, contiguous.

    Returns:
        ``tensor`` itself if it is smaller than a huge page, or on a system without such advice.

    Raises:
        OSError: no memory.
    """
    if tensor.nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # Linux may be built without huge pages; then this is ordinary memory
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
