"""Credentials do not appear in anything that a search on S3 leaves behind, whether it succeeds or fails."""

import base64
import json
import os
import subprocess
import sys
import uuid

import pytest
from prefect.client.orchestration import get_client

from layerwise.storage.files.filesystem import open_filesystem

HUB_TOKEN = "hf_thisTokenIsASecret0123456789"
AUTH_STRING = "admin:thisPasswordIsASecret0123456789"
WRONG = "thisWrongSecret0123456789"


@pytest.fixture(scope="module")
def bucket_of_secrets(s3_bucket):
    return f"s3://{s3_bucket}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def run(recording_server, s3_bucket, workshop, pytestconfig, tmp_path_factory):
    """Return a function that runs a search with all logs on the terminal, and returns the exit code and the output."""

    def search(store: str, **environment: str) -> tuple[int, str]:
        own = {
            "PREFECT_API_URL": recording_server,
            "PREFECT_HOME": str(tmp_path_factory.mktemp("home")),
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "HF_TOKEN": HUB_TOKEN,
            "PREFECT_API_AUTH_STRING": AUTH_STRING,
        }
        options = [f"--{n.replace('_', '-')}={v}" for n, v in workshop.parameters(betas="0.1").items()]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "layerwise",
                "search",
                *options,
                "--store",
                store,
                "--boundary-layers=1",
            ],
            cwd=pytestconfig.rootpath,
            env=os.environ | own | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    return search


def secrets() -> list[str]:
    own = [os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"], HUB_TOKEN, WRONG]
    sent = base64.b64encode(AUTH_STRING.encode()).decode()  # is in the header of every request
    return [*own, AUTH_STRING.partition(":")[2], sent]


def found_in(text: str) -> list[str]:
    return [secret for secret in secrets() if secret in text]


def everything_in_prefect() -> str:
    """Return runs with their parameters and states, logs and artifacts, as the database of Prefect has them."""
    documents: list[object] = []
    with get_client(sync_client=True) as client:
        for what in ("flow_runs", "task_runs", "logs", "artifacts", "deployments", "flows"):
            offset = 0
            while page := client.request(
                "POST", f"/{what}/filter", json={"limit": 200, "offset": offset}
            ).json():
                documents += page
                offset += len(page)
    return json.dumps(documents)


def test_no_credential_is_anywhere_after_a_search_on_s3(run, bucket_of_secrets):
    code, printed = run(bucket_of_secrets)
    assert code == 0, printed
    assert "capture" in printed
    assert found_in(printed) == []

    fs, root = open_filesystem(bucket_of_secrets)
    objects = fs.find(root)
    assert len(objects) > 20
    for path in objects:
        content = fs.cat_file(path).decode(errors="replace")
        assert found_in(path + content) == [], path

    known = everything_in_prefect()
    assert bucket_of_secrets in known
    assert found_in(known) == []


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_no_credential_is_shown_when_the_storage_refuses_it(run, bucket_of_secrets, name):
    code, printed = run(f"{bucket_of_secrets}/refused", **{name: WRONG})
    assert code == 1
    assert "credentials" in printed
    assert found_in(printed) == []
    assert found_in(everything_in_prefect()) == []
