"""The kernel, called directly."""

import logging

import pytest
import torch

from layerwise.sparse import native
from layerwise.sparse.bitmask import pack
from layerwise.sparse.native import LEVELS, Kernel
from layerwise.sparse.panel_weight import PANEL_COLUMNS, PanelWeight, panels_of
from tests.layerwise.sparse.shapes import (
    DTYPES,
    check_products,
    every_weight,
    require_product,
    sparse_weight,
)

WEIGHT = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, -3.0]])


def test_a_product_by_hand(kernel):
    inputs, bias = torch.tensor([[1.0, 10.0, 100.0]]), torch.tensor([0.5, 0.25, 1.0])
    assert kernel.multiply(panels_of(pack(WEIGHT)), inputs, bias).tolist() == [[20.5, 0.25, -298.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_equal_those_of_the_dense_weight(kernel, dtype):
    for weight, dense in every_weight(dtype):
        check_products(kernel, weight, dense, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacked_rows_equal_those_of_the_dense_weight(kernel, dtype):
    for weight, dense in every_weight(dtype):
        first = dense.shape[0] // 3
        rows = torch.full((dense.shape[0] - first, dense.shape[1]), 7.0, dtype=kernel.dense_dtype(dtype))
        kernel.unpack_rows(weight, first, rows)
        in_steps = weight.scales is not None and rows.dtype == torch.bfloat16
        scaled = rows.float() * weight.scales[first:, None] if in_steps else rows
        assert torch.equal(scaled, dense[first:].to(scaled.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_may_have_any_alignment(kernel, dtype):
    dense = sparse_weight((9, 77), 0.6, dtype)
    aligned = panels_of(pack(dense))

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(1), tensor])[1:]

    weight = PanelWeight(
        aligned.shape, shifted(aligned.mask), shifted(aligned.values), shifted(aligned.starts)
    )
    inputs = shifted(torch.randn(3 * 77).to(dtype)).view(3, 77)
    assert weight.values.data_ptr() % 16
    assert weight.mask.data_ptr() % 2
    require_product(kernel.multiply(weight, inputs), inputs, dense)


def test_infinities_and_nans_propagate_through_nonzero_weights(kernel):
    weight = panels_of(pack(torch.tensor([[2.0, 0.0], [-1.0, 0.0]])))
    inputs = torch.tensor([[torch.inf, 0.0], [torch.nan, 0.0]])
    outputs = kernel.multiply(weight, inputs)
    assert outputs[0].tolist() == [torch.inf, -torch.inf]
    assert outputs[1].isnan().all()
    in_steps = panels_of(pack(torch.tensor([[2.0, 0.0], [-1.0, 0.0]])), int8=True)
    assert not kernel.multiply(in_steps, inputs.bfloat16()).isfinite().any()
    in_bfloat16 = panels_of(pack(torch.tensor([[2.0]], dtype=torch.bfloat16)))
    assert kernel.multiply(in_bfloat16, torch.tensor([[torch.nan]], dtype=torch.bfloat16)).isnan().all()


@pytest.mark.parametrize("largest", [1e-40, 1.0, 1e38])
def test_int8_sums_do_not_overflow_with_the_largest_panel(kernel, largest):
    columns = PANEL_COLUMNS
    weight = panels_of(pack(torch.ones(2, columns).mul_(torch.tensor([[1.0], [-3.0]]))), int8=True)
    inputs = torch.full((1, columns), largest, dtype=torch.bfloat16)
    expected = inputs.double().sum() * torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    outputs = kernel.multiply(weight, inputs)
    if largest < 1e30:  # beyond this, the sum is not exact in bfloat16
        torch.testing.assert_close(outputs.double(), expected, rtol=2**-7, atol=0)
    else:
        assert outputs.tolist() == [[torch.inf, -torch.inf]]


def test_the_number_of_threads_is_torchs_and_does_not_change_the_result(kernel):
    weight = panels_of(pack(sparse_weight((101, 300), 0.7)))
    inputs = torch.randn(5, 300)
    threads, products = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            products.append(kernel.multiply(weight, inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(product, products[0]) for product in products)


def test_the_product_of_a_token_depends_on_other_tokens_only_by_rounding(kernel):
    weight = panels_of(pack(sparse_weight((40, 500), 0.7)))
    inputs = torch.randn(13, 500)
    together = kernel.multiply(weight, inputs)
    alone = torch.cat([kernel.multiply(weight, token[None]) for token in inputs])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "inputs, bias, error, message",
    [
        (torch.zeros(1, 4), None, ValueError, r"shape \(3, 3\) does not match inputs of shape \(1, 4\)"),
        (torch.zeros(3), None, ValueError, r"inputs of shape \(3,\)"),
        (torch.zeros(1, 3), torch.zeros(2), ValueError, r"a bias of shape \(2,\)"),
        (torch.zeros(1, 3).bfloat16(), None, TypeError, "float32 weight .* torch.bfloat16 inputs"),
        (torch.zeros(1, 3), torch.zeros(3).half(), TypeError, "a torch.float16 bias"),
        (torch.zeros(1, 3, device="meta"), None, ValueError, "the inputs are on meta"),
    ],
)
def test_tensors_that_do_not_match_are_refused_before_the_kernel_is_called(
    best_kernel, inputs, bias, error, message
):
    with pytest.raises(error, match=message):
        best_kernel.multiply(panels_of(pack(WEIGHT)), inputs, bias)


def test_a_level_that_the_cpu_does_not_support_is_refused(best_kernel):
    if best_kernel.level == LEVELS[-1]:
        pytest.skip("this CPU has all levels")
    with pytest.raises(ValueError, match=f"up to {best_kernel.level}, not avx512_bf16"):
        Kernel(best_kernel.library, "avx512_bf16")


def test_a_missing_kernel_is_reported_once(no_kernel, caplog):
    with caplog.at_level(logging.WARNING):
        assert native.kernel() is None
        assert native.kernel() is None
    (record,) = caplog.records
    assert "ranking weights takes four times as long" in record.getMessage()
    assert "pruned models run as slowly as dense ones" in record.getMessage()


def test_a_library_from_other_sources_is_not_used(best_kernel, monkeypatch):
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    native.kernel.cache_clear()
    assert native.kernel() is None
