"""Huge pages for arrays that are read completely for every token."""

import errno
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a copy of ``tensor`` in memory for which huge pages were requested.

    With pages of 4 kB, an address must be translated after every 64 cache lines, which is slow on virtual machines.
    torch requests huge pages only if ``THP_MEM_ALLOC_ENABLE`` is set.

    Args:
        tensor: contiguous tensor on the CPU.

    Returns:
        Copy of ``tensor``, or ``tensor`` itself if it is smaller than a huge page or the system has no huge pages.

    Raises:
        OSError: there is not enough memory.
    """
    if tensor.nbytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor
    # The copy starts at the start of a huge page. The memory before and after it is never touched and takes no space.
    memory = mmap.mmap(-1, tensor.nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    try:
        memory.madvise(mmap.MADV_HUGEPAGE, offset, tensor.nbytes // HUGE_PAGE * HUGE_PAGE)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: Linux was built without huge pages
            raise
        return tensor
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return copy.view(tensor.shape).copy_(tensor)
