"""Times as text."""

import pytest

from layerwise.display.duration import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.123, "0.12 s"),
        (59.4, "59 s"),
        (59.9, "1 min"),
        (210, "3.5 min"),
        (7170, "2 h"),
        (12 * 3600, "12 h"),
        (5e5, "5.8 days"),
    ],
)
def test_a_time_has_two_digits_in_a_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
