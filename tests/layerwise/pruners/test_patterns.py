"""N:M patterns: parsing, and rounding of sparsities to levels, by hand."""

import pytest

from layerwise.allocators.budget import weighted_mean
from layerwise.pruners.patterns import Pattern, on_levels


@pytest.mark.parametrize(
    ("text", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4), ("N:8", None, 8)]
)
def test_a_pattern_is_parsed(text, kept, group):
    assert Pattern.parse(text) == Pattern(kept, group)


@pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "2", "2:4:8", "M:N", "N:1", "", "2/4"])
def test_a_text_that_is_not_a_pattern_is_refused(text):
    with pytest.raises(ValueError, match="is not an N:M pattern"):
        Pattern.parse(text)


def test_sparsities_are_rounded_to_the_nearest_levels_that_meet_the_target():
    # In eighths 4.4, 5.5, 6.05 and 6.05, together 22: rounded down 4, 5, 6, 6, and one more for the second.
    assert on_levels([0.55, 0.6875, 0.75625, 0.75625], [10] * 4, 0.6875, 8) == (0.5, 0.75, 0.75, 0.75)


def test_sparsities_on_a_level_do_not_change():
    assert on_levels([0.25, 0.5, 0.75], [8, 8, 8], 0.5, 4) == (0.25, 0.5, 0.75)


@pytest.mark.parametrize("beta", [0.0, 0.004, 0.01, 0.02])
@pytest.mark.parametrize("target", [0.5, 0.6, 0.7])
def test_an_arithmetic_progression_keeps_its_mean_and_its_order(target, beta):
    line = [target + beta * (layer - 14.5) for layer in range(30)]
    levels = on_levels(line, [3000] * 30, target, 8)
    assert weighted_mean(levels, [3000] * 30) == pytest.approx(target, abs=1e-12)
    assert all(abs(level - sparsity) < 1 / 8 for level, sparsity in zip(levels, line, strict=True))
    assert list(levels) == sorted(levels) or beta == 0
    assert all((8 * level).is_integer() for level in levels)


def test_a_target_between_the_levels_is_refused_with_the_nearest_possible_one():
    with pytest.raises(ValueError, match=r"of 0\.50000, not 0\.6\. Set the overall sparsity to 0\.5"):
        on_levels([0.6], [8], 0.6, 4)
