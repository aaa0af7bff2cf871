"""Upper triangle of a symmetric matrix in panels."""

import pytest
import torch

from layerwise.calibration.upper_triangle import fill_symmetric, panel_entries, upper_panels

MATRIX = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])


def test_the_panels_of_a_matrix_by_hand(monkeypatch):
    monkeypatch.setattr("layerwise.calibration.upper_triangle.PANEL", 2)
    panels = [(first, panel.tolist()) for first, panel in upper_panels(MATRIX)]
    assert panels == [(0, [[1, 2, 3], [2, 4, 5]]), (2, [[6]])]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("panel", [1, 2, 3, 7, 100])
def test_the_panels_in_any_order_give_the_matrix(monkeypatch, size, panel):
    monkeypatch.setattr("layerwise.calibration.upper_triangle.PANEL", panel)
    numbers = torch.arange(float(size * size)).reshape(size, size)
    matrix = numbers + numbers.T
    panels = list(upper_panels(matrix))
    assert sum(part.numel() for _, part in panels) == panel_entries(size)
    assert torch.equal(fill_symmetric(torch.empty(size, size), reversed(panels)), matrix)


def test_a_large_matrix_takes_little_more_than_half_of_its_entries():
    assert panel_entries(28672) == pytest.approx(28672**2 / 2, rel=0.04)
