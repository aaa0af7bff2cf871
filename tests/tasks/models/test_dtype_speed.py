"""Dtype speed: the warning about a dtype without fast instructions on the device."""

import logging

import pytest

from layerwise.tasks.models import dtype_speed
from layerwise.tasks.models.dtype_speed import warn_if_slow
from layerwise.tasks.running.execution import Execution


@pytest.mark.parametrize("tolerable, warned", [(0.0, True), (float("inf"), False)])
def test_a_slow_dtype_gives_a_warning_with_a_remedy(monkeypatch, caplog, tolerable, warned):
    monkeypatch.setattr(dtype_speed, "TOLERABLE", tolerable)
    with caplog.at_level(logging.WARNING):
        warn_if_slow("bfloat16", Execution())
    assert ("--dtype float32" in caplog.text) is warned


def test_float32_gives_no_warning(monkeypatch, caplog):
    monkeypatch.setattr(dtype_speed, "TOLERABLE", 0.0)
    warn_if_slow("float32", Execution())
    assert caplog.text == ""
