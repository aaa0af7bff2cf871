"""Canonical JSON: equal values give equal text, and values without a JSON form are refused."""

import pytest

from layerwise.storage.formats.canonical_json import canonical_json, digest


def test_tuples_equal_lists_and_minus_zero_equals_zero():
    assert digest((1, [2.5, -0.0])) == digest([1, (2.5, 0.0)])


def test_a_digest_is_32_hex_digits():
    assert int(digest({}), 16) >= 0
    assert len(digest({})) == 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_without_a_json_form_are_refused(value):
    with pytest.raises(ValueError, match=r"value\['beta'\]\[1\] is -?(nan|inf), which has no JSON form"):
        canonical_json({"beta": [0.0, value]})
