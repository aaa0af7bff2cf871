"""2:4 weights: the layout is that of torch's sparse tensors, as read on the CPU."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from layerwise.sparse.semi_structured import SemiStructuredWeight, is_semi_structured, pack, unpack

SHAPES = [(32, 64), (64, 64), (32, 192), (96, 256)]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


def two_of_four(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    weight = torch.rand(rows * columns // 4, 4) + 0.5
    removed = torch.rand(weight.shape).argsort(dim=1) < 2
    return weight.masked_fill(removed, 0).view(rows, columns).to(dtype)


def bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16)


def as_torch_reads(packed: SemiStructuredWeight) -> Tensor:
    rows, half = packed.values.shape
    parts = packed.values, packed.metadata, None, None, None
    return SparseSemiStructuredTensorCUTLASS(torch.Size((rows, 2 * half)), *parts).to_dense()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_the_weight_that_was_packed(shape, dtype):
    weight = two_of_four(*shape, dtype)
    assert torch.equal(as_torch_reads(pack(weight)), weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_equals_torchs_own_conversion(shape):
    weight = two_of_four(*shape)
    weight[torch.rand(shape) < 0.3] = 0  # groups of four with fewer than two stored weights
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    packed = pack(weight)
    assert torch.equal(packed.values, values)
    assert torch.equal(packed.metadata, metadata)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_weight_is_restored_bit_for_bit(shape):
    weight = two_of_four(*shape)
    weight[weight > 1.3] = -0.0
    for result in (unpack(pack(weight)), as_torch_reads(pack(weight))):
        assert torch.equal(bits(result), bits(weight))


def test_all_selections_of_at_most_two_of_four_are_restored():
    ways = [way for way in product((0.0, 1.0), repeat=4) if sum(way) <= 2]
    weight = torch.tensor(ways + [(0.0,) * 4] * 5).view(1, 64).repeat(32, 1).half()
    assert is_semi_structured(weight)
    assert torch.equal(unpack(pack(weight)), weight)


def test_the_first_row_of_a_small_weight_by_hand():
    # Of every four inputs the first and the last are stored: positions 0 and 3, bits 1100, in every int16 four times.
    weight = torch.tensor([1.0, 0.0, 0.0, 2.0]).repeat(32, 16).half()
    packed = pack(weight)
    assert packed.values[0].tolist() == [1.0, 2.0] * 16
    assert (packed.metadata == 0xCCCC - (1 << 16)).all()
    assert packed.metadata.shape == (32, 4)


def test_the_size_is_nine_sixteenths_of_the_dense_size():
    weight = two_of_four(64, 128)
    assert pack(weight).nbytes == 9 * weight.nbytes // 16


def test_a_weight_with_three_of_four_in_one_place_is_not_2_4():
    weight = two_of_four(32, 64)
    weight[5, 8:12] = torch.tensor([0.0, 1.0, -0.0, 2.0])
    assert not is_semi_structured(weight), "-0.0 is stored, too"
    with pytest.raises(ValueError, match="is not 2:4"):
        pack(weight)


@pytest.mark.parametrize("shape", [(16, 64), (32, 32), (64,), (2, 32, 64)])
def test_shapes_that_torchs_kernels_do_not_support_are_refused(shape):
    assert not is_semi_structured(torch.zeros(shape).half())
    with pytest.raises(ValueError):
        pack(torch.zeros(shape).half())


def test_float32_is_refused():
    """For float32, the tensor cores need 1:2 instead of 2:4."""
    assert not is_semi_structured(two_of_four(32, 64, torch.float32))


def test_a_transposed_view_is_packed_in_its_own_shape():
    weight = two_of_four(64, 64)
    assert torch.equal(unpack(pack(weight.T.contiguous().T)), weight)


def test_parts_that_do_not_match_are_refused():
    packed = pack(two_of_four(32, 64))
    with pytest.raises(ValueError, match=r"metadata of shape \(32, 3\)"):
        SemiStructuredWeight(packed.values, packed.metadata[:, :3])
    with pytest.raises(ValueError, match=r"values of shape \(31, 32\)"):
        SemiStructuredWeight(packed.values[:31], packed.metadata[:31])
    with pytest.raises(TypeError, match=r"torch.int32"):
        SemiStructuredWeight(packed.values, packed.metadata.int())
