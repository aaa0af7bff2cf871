"""The warning about a dtype that the device has no instructions for."""

import logging

import pytest

from layerwise.tasks.models import dtype_speed
from layerwise.tasks.models.dtype_speed import warn_if_slow
from layerwise.tasks.running.execution import Execution


@pytest.mark.parametrize("tolerable, warned", [(0.0, True), (float("inf"), False)])
def test_what_is_slower_than_tolerable_is_said_with_the_way_out(monkeypatch, caplog, tolerable, warned):
    monkeypatch.setattr(dtype_speed, "TOLERABLE", tolerable)
    with caplog.at_level(logging.WARNING):
        warn_if_slow("bfloat16", Execution())
    assert ("--dtype float32" in caplog.text) is warned


def test_nothing_is_said_about_float32(monkeypatch, caplog):
    monkeypatch.setattr(dtype_speed, "TOLERABLE", 0.0)
    warn_if_slow("float32", Execution())
    assert caplog.text == ""
