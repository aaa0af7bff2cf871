"""A storage that cannot decide who was first is refused before any work is done."""

import os

import pytest

from layerwise.storage.files.errors import Unreachable
from layerwise.storage.files.probe import require_exclusive_creation
from layerwise.storage.files.reading import open_filesystem
from tests.faults import error, ignore_condition, lose_answer

ALWAYS = float("inf")


def test_every_storage_of_ours_passes_and_nothing_is_left(store):
    require_exclusive_creation(store.fs, store.root)
    assert not [path for path in store.fs.find(store.root) if "/probe-" in path]


def test_a_server_that_ignores_the_condition_is_refused_by_name(fault_proxy, s3_bucket):
    fs, root = open_filesystem(f"s3://{s3_bucket}/ignoring")
    fault_proxy.inject(ignore_condition, lambda request: request.conditional, times=ALWAYS)
    with pytest.raises(
        OSError, match=r"cannot be a store: .*\[True, True\].* SeaweedFS 4.48 and Ceph"
    ) as refusal:
        require_exclusive_creation(fs, root)
    assert f"{root} at {fault_proxy.url}" in str(refusal.value)
    assert not [path for path in fs.find(root) if "/probe-" in path]


def test_a_lost_answer_is_no_reason_to_refuse(fault_proxy, s3_bucket):
    fs, root = open_filesystem(f"s3://{s3_bucket}/probe-lost")
    fault_proxy.inject(lose_answer, lambda request: request.conditional)
    require_exclusive_creation(fs, root)
    assert len(fault_proxy.caught) == 1


def test_credentials_that_may_only_read_are_told_as_that(fault_proxy, s3_bucket):
    fs, root = open_filesystem(f"s3://{s3_bucket}/probe-read-only")
    fault_proxy.inject(error(403), lambda request: request.writes, times=ALWAYS)
    with pytest.raises(PermissionError, match="was refused .* credentials that may read and write there"):
        require_exclusive_creation(fs, root)


def test_a_server_that_is_not_there_is_unreachable(s3_bucket):
    once = {"retries": {"total_max_attempts": 1}}
    fs, root = open_filesystem("s3://bucket/run", endpoint_url="http://127.0.0.1:9", config_kwargs=once)
    with pytest.raises(Unreachable, match="bucket/run/probe-.* at http://127.0.0.1:9 cannot be reached"):
        require_exclusive_creation(fs, root)


def test_a_disk_without_hard_links_is_refused(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    fs, root = open_filesystem(str(tmp_path))
    with pytest.raises(OSError, match="no hard links"):
        require_exclusive_creation(fs, root)
    assert list(tmp_path.iterdir()) == []
