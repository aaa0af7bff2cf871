"""Numbers of bytes are shown with a unit and few digits."""

import pytest

from layerwise.display.byte_size import size, size_in


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, ""),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (141_200_000, "141 MB"),
        (1_237_000_000, "1.24 GB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_a_size_has_three_digits_and_a_decimal_unit(count, text):
    assert size(count) == text


def test_a_size_can_be_given_in_a_fixed_unit():
    assert size_in("GiB", 3 * 2**29, 1) == "1.5 GiB"
    assert size_in("MB", 93_400_000) == "93 MB"
