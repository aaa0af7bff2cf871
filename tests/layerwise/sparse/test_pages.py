"""Arrays in huge pages."""

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.bitmask import pack
from layerwise.sparse.pages import HUGE_PAGE, in_huge_pages
from layerwise.sparse.panels import panels_of

has_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages"
)


def is_advised(tensor: Tensor) -> bool:
    """Whether Linux knows the memory of a tensor as what is to be in huge pages: the flag hg of its mapping."""
    address, found = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(f"no mapping has the address {address:x}")


@has_huge_pages
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32])
def test_a_large_array_is_copied_into_huge_pages(dtype):
    count = 2 * HUGE_PAGE // dtype.itemsize + 3
    ordinary = torch.arange(count).to(dtype)
    copied = in_huge_pages(ordinary)
    assert is_advised(copied)
    assert not is_advised(ordinary)
    assert copied.dtype == dtype
    assert torch.equal(copied, ordinary)
    copied[0] = 77
    assert ordinary[0] == 0


@has_huge_pages
@pytest.mark.parametrize("int8", [False, True])
def test_a_packed_weight_has_its_mask_and_values_there(int8):
    weight = panels_of(pack(torch.randn(4200, 6400)[:, :6200]), int8)
    assert is_advised(weight.mask)
    assert is_advised(weight.values)


def test_a_small_array_stays_where_it_is():
    small = torch.zeros(HUGE_PAGE - 1, dtype=torch.uint8)
    assert in_huge_pages(small) is small


def test_a_system_without_such_advice_keeps_its_arrays(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    large = torch.zeros(HUGE_PAGE, dtype=torch.uint8)
    assert in_huge_pages(large) is large


def test_a_linux_without_huge_pages_gives_ordinary_memory(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # which no Linux knows: EINVAL, as there
    large = torch.ones(HUGE_PAGE, dtype=torch.uint8)
    assert torch.equal(in_huge_pages(large), large)
