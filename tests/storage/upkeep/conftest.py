"""Fixtures for garbage collection."""

import pytest


@pytest.fixture
def no_grace_period(monkeypatch):
    """Let a garbage collection delete new files as well."""
    monkeypatch.setattr("layerwise.storage.upkeep.garbage_collection.GRACE_SECONDS", 0.0)
