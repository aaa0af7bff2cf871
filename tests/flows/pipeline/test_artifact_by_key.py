"""Search that a command uses if no key is given: the newest by the storage's clock, named on stderr."""

import logging
import os
import time
from datetime import UTC, datetime

import pytest

from layerwise.flows.pipeline.artifact_by_key import artifact_by_key
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.search_result import RESULT_STAGE


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


def finish_search(store, source):
    settings = {"sparsity": 0.5, "pruner": {"method": "wanda"}}
    stage = Stage(RESULT_STAGE, 1, {"settings": settings, "source": source})
    return store.get_or_build(stage, lambda draft: draft.facts.update(source=source))


def date(store, artifact, dated, recorded):
    """Rewrite a manifest as an older version would have, with both of its times set to a number of seconds ago.

    Args:
        dated: age by the storage's date of the manifest.
        recorded: age by the clock of the machine that wrote it.
    """
    path, now = f"{store.root}/{artifact.key}/manifest.json", time.time()
    content = read_sealed(store.fs, path)
    del content["token"], content["made"]["clock"]
    content["made"]["at"] = datetime.fromtimestamp(now - recorded, UTC).isoformat(timespec="seconds")
    overwrite(store.fs, path, seal(content))
    os.utime(path, (now - dated, now - dated))


def test_the_newest_of_several_searches_is_used_and_named(store, capsys, caplog):
    finish_search(store, "first/model")
    assert artifact_by_key(store, None).facts["source"] == "first/model"
    assert capsys.readouterr().err == ""  # there is nothing to choose
    newest = finish_search(store, "second\x1b[2J/model")
    assert artifact_by_key(store, None) == newest
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"The newest of 2 searches: {newest.key}, second\\x1b[2J/model at sparsity 0.5, wanda, finish"
    )
    assert caplog.records == []
    assert artifact_by_key(store, newest.key[:12]) == newest
    assert capsys.readouterr().err == ""


def test_a_search_of_an_older_version_with_a_fast_clock_is_named_but_not_used(store, caplog):
    ahead, newest = finish_search(store, "ahead/model"), finish_search(store, "newest/model")
    date(store, ahead, dated=7200, recorded=-7200)
    with caplog.at_level(logging.WARNING):
        assert artifact_by_key(store, None) == newest
    [record] = caplog.records
    assert "Possibly newer: " + ahead.key in record.getMessage()
    assert newest.key not in record.getMessage().partition("Possibly newer")[2]
