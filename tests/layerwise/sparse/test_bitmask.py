"""Bitmask packing, by hand and bit for bit."""

import pytest
import torch
from torch import Tensor

from layerwise.sparse.bitmask import PackedWeight, pack, unpack

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(weight: Tensor) -> Tensor:
    return weight.contiguous().view(INTEGERS[weight.element_size()])


def sparse_weight(rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a weight with exactly this fraction of zeros, rounded."""
    weight = torch.rand(rows, columns) + 0.5
    order = torch.randperm(weight.numel())[: round(sparsity * weight.numel())]
    weight.view(-1)[order] = 0
    return weight.to(dtype)


def test_a_row_is_packed_into_one_bit_per_weight_and_its_nonzero_values():
    packed = pack(torch.tensor([[0.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 7.0, 8.0, 0.0], [0.0] * 10]))
    # Weights 1, 2 and 7 are bits of the first byte, weight 8 is the lowest bit of the second one.
    assert packed.mask.tolist() == [[0b10000110, 0b00000001], [0, 0]]
    assert packed.values.tolist() == [5.0, 6.0, 7.0, 8.0]
    assert packed.shape == (2, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (5, 7), (4, 8), (7, 9), (3, 64)])
def test_a_packed_weight_is_restored_bit_for_bit(shape, dtype):
    weight = sparse_weight(*shape, sparsity=0.6, dtype=dtype)
    result = unpack(pack(weight))
    assert result.dtype == dtype
    assert torch.equal(bits(result), bits(weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_zero_infinity_nan_and_the_smallest_numbers_are_restored(dtype):
    # The smallest subnormal number.
    tiny = torch.tensor([1], dtype=INTEGERS[dtype.itemsize]).view(dtype).item()
    weight = torch.tensor([[0.0, -0.0, float("inf"), float("nan"), tiny, -tiny, 0.0]], dtype=dtype)
    packed = pack(weight)
    assert packed.mask.tolist() == [[0b0111110]]
    assert torch.equal(bits(unpack(packed)), bits(weight))


def test_a_weight_of_more_entries_than_are_selected_at_a_time_is_packed_in_order():
    weight = sparse_weight(1500, 1001, sparsity=0.7)
    packed = pack(weight)
    assert torch.equal(packed.values, weight[weight != 0])
    assert torch.equal(unpack(packed), weight)


def test_a_transposed_view_is_packed_in_its_own_shape():
    weight = sparse_weight(16, 12, sparsity=0.5)
    assert torch.equal(unpack(pack(weight.T)), weight.T)


def test_a_parameter_is_packed_and_left_unchanged():
    weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
    packed = pack(weight)
    assert not packed.values.requires_grad
    assert weight.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("sparsity, ratio", [(0.5, 0.5625), (0.7, 0.3625), (0.9, 0.1625)])
def test_a_16_bit_weight_needs_its_nonzero_values_and_one_bit_per_weight(sparsity, ratio):
    weight = sparse_weight(640, 800, sparsity, torch.bfloat16)
    assert pack(weight).nbytes == pytest.approx(ratio * weight.nbytes, abs=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=r"cannot be packed. Convert it to one of torch.float16"):
        pack(torch.zeros(2, 2, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (8,), (2, 2, 2)])
def test_only_a_matrix_is_packed(shape):
    with pytest.raises(ValueError, match="is not a matrix"):
        pack(torch.zeros(shape))


@pytest.mark.parametrize(
    "mask, values, error, reason",
    [
        ([[0b11]], [1.0], ValueError, "marks 2 weights as stored, but there are 1 values"),
        ([[0b1]], [1.0, 2.0], ValueError, "marks 1 weights as stored, but there are 2 values"),
        ([[0b1000]], [1.0], ValueError, "beyond the 3 inputs"),
        ([[0b1, 0b0]], [1.0], ValueError, r"shapes \(1, 2\) and \(1,\)"),
        ([[0b1]], [[1.0]], ValueError, r"shapes \(1, 1\) and \(1, 1\)"),
    ],
)
def test_parts_that_do_not_match_are_refused(mask, values, error, reason):
    with pytest.raises(error, match=reason):
        PackedWeight((1, 3), torch.tensor(mask, dtype=torch.uint8), torch.tensor(values))


def test_a_mask_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"uint8, not torch.int64"):
        PackedWeight((1, 3), torch.tensor([[1]]), torch.tensor([1.0]))
