"""Arrays in huge pages."""

import copy
import gc
import mmap
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerwise.sparse.bitmask import pack
from layerwise.sparse.bitmask_linear import BitmaskLinear
from layerwise.sparse.huge_pages import HUGE_PAGE, in_huge_pages
from tests.layerwise.sparse.shapes import require_product, sparse_weight

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
gives_huge_pages = pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this system gives no huge pages"
)


def bytes_in_huge_pages(tensor: Tensor) -> int:
    """Return the number of bytes in huge pages of the mapping with the tensor's first element, as reported by Linux."""
    address, found = tensor.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"no mapping has the address {address:x}")


@gives_huge_pages
@pytest.mark.parametrize("pages", [1, 1.2, 2.9])
def test_an_array_is_in_as_many_huge_pages_as_possible(pages):
    array = in_huge_pages(torch.ones(int(pages * HUGE_PAGE), dtype=torch.uint8))
    assert array.data_ptr() % HUGE_PAGE == 0
    assert bytes_in_huge_pages(array) >= int(pages) * HUGE_PAGE


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float32])
def test_a_copy_has_the_same_numbers_in_the_same_shape(dtype):
    array = torch.arange(3 * HUGE_PAGE // dtype.itemsize).to(dtype).view(3, -1)
    copied = in_huge_pages(array)
    assert copied.dtype == dtype
    assert torch.equal(copied, array)
    copied[0, 0] = 77
    assert array[0, 0] == 0


@gives_huge_pages
@pytest.mark.usefixtures("best_kernel")
@pytest.mark.parametrize("int8", [False, True])
def test_a_large_packed_weight_is_in_huge_pages_and_multiplies_correctly(int8):
    weight = sparse_weight((2100, 8200), 0.8, torch.bfloat16)
    linear = BitmaskLinear(pack(weight), int8=int8)
    for part in (linear.panels.mask, linear.panels.values):
        assert bytes_in_huge_pages(part) >= HUGE_PAGE
    inputs = torch.randn(2, 8200).bfloat16()
    outputs = linear(inputs)
    if not int8:
        require_product(outputs, inputs, weight)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(other(inputs), outputs)
    values, before = linear.panels.values[-5:], linear.panels.values[-5:].clone()
    del linear
    gc.collect()
    assert torch.equal(values, before)


def test_a_small_array_is_not_copied():
    small = torch.zeros(HUGE_PAGE - 1, dtype=torch.uint8)
    assert in_huge_pages(small) is small


def test_without_huge_pages_arrays_are_not_copied(monkeypatch):
    large = torch.zeros(HUGE_PAGE, dtype=torch.uint8)
    # An unknown value, for which Linux returns EINVAL, as it does without huge pages.
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999, raising=False)
    assert in_huge_pages(large) is large
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert in_huge_pages(large) is large
