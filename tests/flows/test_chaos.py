"""Searches that are killed twenty times, on a local disk and on S3, lose at most one layer of work per kill."""

import uuid

from tests.chaos import Chaos
from tests.small_search import small_search


def test_after_twenty_kills_every_artifact_is_that_of_an_undisturbed_search(
    s3_bucket, prefect_backend, tmp_path
):
    stores = [str(tmp_path / "stores"), f"s3://{s3_bucket}/{uuid.uuid4().hex}"]
    settings = small_search(tmp_path / "model", layers=6) | {"recover": "refit"}
    # "evaluate" is also the export, which is written in the same pass.
    stages = {"import_checkpoint", "capture", "branch", "recover", "evaluate"}
    report = Chaos(settings, stores, tmp_path / "attempts", prefect_backend, seed=0).run(20, stages)
    print(report)
    assert report.problems == []
    assert report.kills.total() >= 20
    assert set(report.kills) >= stages
    assert report.pieces <= report.needed + report.kills.total()
