"""S3 settings: endpoint, region, profile and anonymous access, from AWS variables and the fsspec configuration."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from layerwise.storage.files.errors import Unreachable, reaching
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.files.publishing import create_once, publish
from layerwise.storage.files.reading import read_exactly
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from tests.fault_proxy import FaultProxy
from tests.faults import error

ROOT = Path(__file__).parents[3]
KEY, SECRET = "testkey", "testsecretkey1234"
STAGE = Stage("notes", 1)

WRITE_AND_READ = """
import sys
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

store = ArtifactStore(sys.argv[1])
artifact = store.get_or_build(Stage("notes", 1), lambda draft: draft.write("notes.txt", b"content"))
assert store.read(artifact, "notes.txt") == b"content"
"""
READ = """
import sys
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

store = ArtifactStore(sys.argv[1])
print(store.read(store.find(Stage("notes", 1)), "notes.txt").decode())
"""


def run_with(home: Path, script: str, url: str, settings: dict[str, str]) -> subprocess.CompletedProcess:
    """Run ``script`` in a process whose S3 settings are only those in ``settings`` and ``home``."""
    usual = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_", "XDG_"))
    }
    environment = {**usual, "HOME": str(home), "AWS_EC2_METADATA_DISABLED": "true", **settings}
    return subprocess.run(
        [sys.executable, "-c", script, url],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def written_with(home: Path, s3_bucket: str, settings: dict[str, str]) -> ArtifactStore:
    """Write an artifact in a subprocess with these settings; return the store, as this process reads it."""
    url = f"s3://{s3_bucket}/{uuid.uuid4().hex}"
    done = run_with(home, WRITE_AND_READ, url, settings)
    assert done.returncode == 0, done.stderr
    store = ArtifactStore(url)
    artifact = store.find(STAGE)
    assert artifact is not None
    assert store.read(artifact, "notes.txt") == b"content"
    return store


def credential_scopes(proxy: FaultProxy) -> set[str]:
    """Return the keys and regions that requests were signed with."""
    signatures = [request.headers["authorization"] for request in proxy.requests]
    scopes = [signature.partition("Credential=")[2].split("/") for signature in signatures]
    return {f"{scope[0]}/{scope[2]}" for scope in scopes}


def test_endpoint_and_region_come_from_the_aws_variables(fault_proxy, s3_bucket, tmp_path):
    settings = {"AWS_ENDPOINT_URL": fault_proxy.url, "AWS_DEFAULT_REGION": "eu-central-1"}
    fault_proxy.requests.clear()
    written_with(tmp_path, s3_bucket, {**settings, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET})
    assert f"{KEY}/eu-central-1" in credential_scopes(fault_proxy)


def test_all_settings_can_come_from_a_profile(fault_proxy, s3_bucket, tmp_path):
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = eu-west-3\nendpoint_url = {fault_proxy.url}\n[default]\nregion = us-east-1\n"
    )
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id={KEY}\naws_secret_access_key={SECRET}\n")
    settings = {
        "AWS_PROFILE": "lab",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }
    written_with(tmp_path, s3_bucket, settings)
    assert f"{KEY}/eu-west-3" in credential_scopes(fault_proxy)


def test_all_settings_can_come_from_the_fsspec_variables(fault_proxy, s3_bucket, tmp_path):
    settings = {
        "FSSPEC_S3_ENDPOINT_URL": fault_proxy.url,
        "FSSPEC_S3_KEY": KEY,
        "FSSPEC_S3_SECRET": SECRET,
        "FSSPEC_S3_CLIENT_KWARGS": '{"region_name": "ap-south-1"}',
        "FSSPEC_S3_CONFIG_KWARGS": '{"user_agent_extra": "from-fsspec"}',
    }
    written_with(tmp_path, s3_bucket, settings)
    assert f"{KEY}/ap-south-1" in credential_scopes(fault_proxy)
    assert any("from-fsspec" in request.headers["user-agent"] for request in fault_proxy.requests)


def test_all_settings_can_come_from_the_fsspec_file(fault_proxy, s3_bucket, tmp_path):
    (tmp_path / ".config" / "fsspec").mkdir(parents=True)
    options = {"endpoint_url": fault_proxy.url, "key": KEY, "secret": SECRET}
    (tmp_path / ".config" / "fsspec" / "conf.json").write_text(json.dumps({"s3": options}))
    written_with(tmp_path, s3_bucket, {})
    assert credential_scopes(fault_proxy)


@pytest.fixture
def public_store(fault_proxy, s3_bucket):
    """URL of a store in a public bucket."""
    fs, _ = open_filesystem(f"s3://{s3_bucket}")
    bucket = f"public-{uuid.uuid4().hex}"
    fs.mkdir(bucket)
    allowed = {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    policy = {"Version": "2012-10-17", "Statement": [allowed]}
    fs.call_s3("put_bucket_policy", Bucket=bucket, Policy=json.dumps(policy))
    store = ArtifactStore(f"s3://{bucket}/run")
    store.get_or_build(STAGE, lambda draft: draft.write("notes.txt", b"content"))
    fault_proxy.requests.clear()
    return store.url


def test_a_public_store_is_read_without_credentials(fault_proxy, public_store, tmp_path):
    settings = {"FSSPEC_S3_ANON": "true", "FSSPEC_S3_ENDPOINT_URL": fault_proxy.url}
    done = run_with(tmp_path, READ, public_store, settings)
    assert done.stdout == "content\n", done.stderr
    assert fault_proxy.requests
    assert not [request for request in fault_proxy.requests if request.signed]


def test_writing_without_credentials_is_refused_clearly_and_unsigned(fault_proxy, public_store, tmp_path):
    settings = {"FSSPEC_S3_ANON": "true", "AWS_ENDPOINT_URL": fault_proxy.url}
    done = run_with(tmp_path, WRITE_AND_READ, f"{public_store}/other", settings)
    assert f"at {fault_proxy.url} was refused" in done.stderr
    assert "credentials that may read and write there" in done.stderr
    assert not [request for request in fault_proxy.requests if request.signed]


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://nohost.invalid:80"])
def test_the_error_about_a_missing_server_names_it_and_the_object(s3_bucket, endpoint):
    quickly = {"retries": {"total_max_attempts": 1}}
    fs, root = open_filesystem("s3://bucket/run", endpoint_url=endpoint, config_kwargs=quickly)
    told = f"bucket/run/file at {endpoint} cannot be reached .* Check the network"
    with pytest.raises(Unreachable, match=f"bytes 0 to 9 of {told}"):
        read_exactly(fs, f"{root}/file", 0, memoryview(bytearray(9)))
    with pytest.raises(Unreachable, match=told):
        publish(fs, f"{root}/file", [b"content"])
    with pytest.raises(Unreachable, match=told):
        create_once(fs, f"{root}/file", b"content")
    with pytest.raises(Unreachable, match=told), reaching(fs, f"{root}/file"):
        fs.info(f"{root}/file")


def test_an_unknown_bucket_is_reported(fault_proxy, s3_bucket):
    fs, root = open_filesystem("s3://no-such-bucket/run")
    told = f"no-such-bucket/run/file at {fault_proxy.url} cannot be opened .* no such bucket. Create it"
    with pytest.raises(FileNotFoundError, match=told):
        read_exactly(fs, f"{root}/file", 0, memoryview(bytearray(9)))
    # SeaweedFS creates a bucket with the first file that is written to it; AWS does not.
    fault_proxy.inject(error(404), lambda request: request.writes, times=float("inf"))
    with pytest.raises(FileNotFoundError, match=told):
        publish(fs, f"{root}/file", [b"content"])
    with pytest.raises(FileNotFoundError, match=told):
        create_once(fs, f"{root}/file", b"content")


@pytest.mark.parametrize(
    "settings",
    [
        {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": "wrong-geheim"},
        {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "wrong-geheim"},
        {},
        {"AWS_PROFILE": "nothing"},
    ],
    ids=["wrong secret", "unknown key", "none", "unknown profile"],
)
def test_invalid_credentials_are_reported_and_not_shown(fault_proxy, s3_bucket, tmp_path, settings):
    settings = {"AWS_ENDPOINT_URL": fault_proxy.url, **settings}
    done = run_with(tmp_path, WRITE_AND_READ, f"s3://{s3_bucket}/{uuid.uuid4().hex}", settings)
    assert done.returncode == 1
    assert "credentials that may read and write there" in done.stderr
    assert "geheim" not in done.stderr
