"""AlphaPruning: exponents of known power laws, and lower sparsity for heavier tails."""

import math

import pytest
import torch
from torch import Tensor

from layerwise.allocators.alpha_pruning import AlphaPruning, alpha_pruning, tail_exponent
from layerwise.allocators.budget import weighted_mean


def orthogonal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def with_spectrum(eigenvalues: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return a matrix with these squared singular values."""
    diagonal = torch.zeros(out_features, in_features, dtype=torch.float64)
    diagonal.diagonal()[: len(eigenvalues)] = eigenvalues.double().sqrt()
    return orthogonal(out_features, 1) @ diagonal @ orthogonal(in_features, 2)


def power_law(exponent: float, count: int) -> Tensor:
    """Return quantiles of the density proportional to x**-exponent above 1."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (1 - uniform) ** (-1 / (exponent - 1))


def published_peak_exponent(eigenvalues: list[float]) -> float:
    """Compute the published definition directly."""
    values = sorted(eigenvalues)
    logs = [math.log10(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    bins = [min(int((log - logs[0]) / width), 99) for log in logs]
    peak = 10 ** (logs[0] + width * min(range(100), key=lambda index: (-bins.count(index), index)))
    best = (math.inf, math.nan)
    for first, smallest in enumerate(values[:-1]):
        if smallest > 1.5 * peak:
            break
        tail = values[first:]
        exponent = 1 + len(tail) / sum(math.log(value / smallest) for value in tail)
        distance = max(
            abs(1 - (value / smallest) ** (1 - exponent) - rank / len(tail))
            for rank, value in enumerate(tail)
        )
        if distance < best[0]:
            best = (distance, exponent)
    return best[1]


@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_estimated_correctly(exponent):
    weight = with_spectrum(power_law(exponent, 300), 300, 300)
    assert tail_exponent(weight) == pytest.approx(exponent, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_the_peak_tail_follows_the_definition(seed):
    eigenvalues = (
        torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp().pow(4)
    )
    weight = with_spectrum(eigenvalues, 40, 52)
    assert tail_exponent(weight) == pytest.approx(published_peak_exponent(eigenvalues.tolist()), rel=1e-6)


def test_a_heavier_tail_has_a_smaller_exponent():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 64, generator=generator)
    strong = noise + 4 * torch.randn(64, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    assert tail_exponent(strong) < tail_exponent(noise)


def test_scale_shape_and_rotation_do_not_matter():
    eigenvalues = power_law(2.2, 40)
    plain = tail_exponent(eigenvalues.sqrt().diag())
    assert tail_exponent(with_spectrum(eigenvalues, 40, 56)) == pytest.approx(plain)
    assert tail_exponent(with_spectrum(eigenvalues, 56, 40)) == pytest.approx(plain)
    assert tail_exponent(1024 * with_spectrum(eigenvalues, 40, 40)) == pytest.approx(plain)


def test_zero_eigenvalues_are_ignored():
    eigenvalues = power_law(3.0, 20)
    plain = tail_exponent(eigenvalues.sqrt().diag())
    assert tail_exponent(with_spectrum(eigenvalues, 30, 30)) == pytest.approx(plain)


def test_weights_are_left_unchanged_and_may_have_a_narrow_dtype():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    before = weight.clone()
    assert tail_exponent(weight) == tail_exponent(weight.double())
    assert torch.equal(weight, before)


def test_weights_without_a_tail_are_refused():
    for weight in (torch.ones(1, 5), torch.ones(3, 3), torch.zeros(3, 3), torch.empty(0, 3), torch.eye(3)):
        with pytest.raises(ValueError, match="AlphaPruning needs two different ones"):
            tail_exponent(weight)
    with pytest.raises(ValueError, match="largest 2 eigenvalues of a weight are all equal"):
        tail_exponent(torch.tensor([1e5, math.nextafter(1e5, 1e6)], dtype=torch.float64).diag())
    for weight in (torch.ones(3), torch.tensor([[1.0, float("nan")], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="has no spectrum"):
            tail_exponent(weight)


def test_a_larger_exponent_gives_a_higher_sparsity():
    # Ratios .7, 1, 1.3; for equal sizes their mean is 1.
    assert alpha_pruning([2.0, 3.0, 4.0], [5, 5, 5], 0.5, epsilon=0.3) == pytest.approx([0.35, 0.5, 0.65])


def test_ratios_are_scaled_so_that_their_weighted_mean_is_the_target():
    # Ratios .8 and 1.2 with sizes 3 and 1: their mean is .9.
    layers = alpha_pruning([2.0, 4.0], [3, 1], 0.45, epsilon=0.2)
    assert layers == pytest.approx([0.45 / 0.9 * 0.8, 0.45 / 0.9 * 1.2])


def test_sparsities_above_1_are_clipped_and_the_others_are_raised():
    # 1.3 x .8 is 1.04: .04 too much, and each of the two others gets half of it.
    assert alpha_pruning([1.0, 2.0, 3.0], [1, 1, 1], 0.8, epsilon=0.3) == pytest.approx([0.58, 0.82, 1.0])


def test_the_weighted_mean_is_the_target_even_after_clipping():
    sizes = [10, 1, 400, 33]
    layers = AlphaPruning(epsilon=0.9).allocate([2.1, 5.0, 3.0, 4.0], sizes, 0.8)
    assert weighted_mean(layers, sizes) == pytest.approx(0.8, abs=1e-12)
    assert 0 <= min(layers) <= max(layers) <= 1


def test_equal_exponents_and_epsilon_0_are_uniform():
    assert AlphaPruning().allocate([2.0, 2.0], [1, 9], 0.7) == (0.7, 0.7)
    assert AlphaPruning(epsilon=0.0).allocate([2.0, 3.0], [1, 9], 0.7) == (0.7, 0.7)
    assert AlphaPruning(epsilon=1.0).allocate([2.0], [9], 0.7) == (0.7,)


@pytest.mark.parametrize("epsilon", [-0.01, 1.01, float("nan")])
def test_an_epsilon_outside_0_and_1_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon of AlphaPruning"):
        AlphaPruning(epsilon=epsilon)
