"""A sparse weight in panels of columns."""

import pytest
import torch

from layerwise.sparse.bitmask import PackedWeight, pack
from layerwise.sparse.panel_weight import PANEL_COLUMNS, PanelWeight, panel_bounds, panels_of
from tests.layerwise.sparse.shapes import DTYPES, SHAPES, SPARSITIES, sparse_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_in_panels_is_restored_bit_for_bit(shape, dtype):
    for sparsity in SPARSITIES:
        weight = sparse_weight(shape, sparsity, dtype)
        assert torch.equal(panels_of(pack(weight)).dense(), weight)


def test_a_weight_of_one_panel_is_the_packed_weight_with_the_starts_of_its_rows():
    weight = panels_of(pack(torch.tensor([[0.0, 2.0, 3.0], [0.0, 0.0, 0.0], [4.0, 0.0, 0.0]])))
    assert weight.mask.tolist() == [0b110, 0, 0b001]
    assert weight.values.tolist() == [2, 3, 4]
    assert weight.starts.tolist() == [0, 2, 2, 3]
    assert weight.nbytes == 3 + 3 * 4 + 4 * 8


@pytest.mark.parametrize("columns", [1, 63, 64, PANEL_COLUMNS, PANEL_COLUMNS + 1, 11008, 28672, 53248])
def test_panels_cover_all_columns_in_equal_parts_that_fit_in_the_cache(columns):
    bounds = panel_bounds(columns)
    widths = [last - first for first, last in bounds]
    assert [first for first, _ in bounds] == [0, *(last for _, last in bounds[:-1])]
    assert bounds[-1][1] == columns
    assert max(widths) <= PANEL_COLUMNS
    assert all(first % 64 == 0 for first, _ in bounds)
    assert len(bounds) == -(-columns // PANEL_COLUMNS)


def test_int8_steps_are_fractions_of_their_row_s_largest_weight():
    weight = panels_of(
        pack(torch.tensor([[127.0, 0.0, -63.4], [0.0, 0.0, 0.0], [0.0, 0.5, 0.25]])), int8=True
    )
    assert weight.values.tolist() == [127, -63, 127, 64]
    assert weight.scales.tolist() == pytest.approx([1.0, 1.0, 0.5 / 127])
    assert weight.dense().tolist() == [[127, 0, -63], [0, 0, 0], [0, 0.5, pytest.approx(64 * 0.5 / 127)]]


def test_int8_weights_differ_by_at_most_half_a_step():
    weight = sparse_weight((20, 13000), 0.5)
    in_steps = panels_of(pack(weight), int8=True)
    assert bool(((in_steps.dense() - weight).abs() <= 0.5001 * in_steps.scales[:, None]).all())


def test_at_70_percent_a_bfloat16_weight_needs_little_more_than_a_third_and_int8_a_fifth():
    weight = sparse_weight((512, 4096), 0.7, torch.bfloat16)
    assert panels_of(pack(weight)).nbytes / weight.nbytes == pytest.approx(0.3 + 1 / 16, abs=0.005)
    assert panels_of(pack(weight), int8=True).nbytes / weight.nbytes == pytest.approx(
        0.15 + 1 / 16, abs=0.005
    )


def test_weights_that_the_kernel_cannot_multiply_are_refused():
    with pytest.raises(TypeError, match="not torch.float16"):
        panels_of(pack(torch.ones(2, 2, dtype=torch.float16)))
    with pytest.raises(ValueError, match=r"\(0, 3\) is empty"):
        panels_of(PackedWeight((0, 3), torch.zeros(0, 1, dtype=torch.uint8), torch.zeros(0)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        panels_of(pack(torch.tensor([[torch.inf]])), int8=True)


def test_parts_that_do_not_match_are_refused():
    whole = panels_of(pack(torch.eye(4)))
    with pytest.raises(ValueError, match="were expected"):
        PanelWeight(whole.shape, whole.mask, whole.values[:-1], whole.starts)
    with pytest.raises(ValueError, match="no scales"):
        PanelWeight(whole.shape, whole.mask, whole.values.to(torch.int8), whole.starts)
