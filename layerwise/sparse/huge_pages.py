"""Memory in huge pages, for arrays that stream by once per token."""

import errno
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in memory that the system is asked to have in huge pages, as far as it fills them.

    In pages of 4 kB an address has to be looked up anew after every 64 cache lines, which is slow on virtual machines.
    torch itself asks for huge pages only where ``THP_MEM_ALLOC_ENABLE`` is set.

    Args:
        tensor: on the CPU, contiguous.

    Returns:
        ``tensor`` itself if it is smaller than a huge page, or on a system that has none.

    Raises:
        OSError: no memory.
    """
    if tensor.nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    # The copy begins where a huge page does. What lies before and behind it is never touched, and takes no memory.
    memory = mmap.mmap(-1, tensor.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, offset, tensor.nbytes // HUGE_PAGE * HUGE_PAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a Linux that was built without huge pages
            raise
        return tensor
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)
