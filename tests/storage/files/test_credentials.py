"""Credentials in URLs are detected and removed."""

import pytest

from layerwise.storage.files.credentials import holds_credentials, without_credentials, without_secrets


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("https://me:secret@host/a.txt?token=secret#secret", "https://host/a.txt"),
        ("s3://AKIA:se/cr/et@bucket/a.txt", "s3://bucket/a.txt"),
        ("simplecache::https://host/a.txt?sig=secret", "simplecache::https://host/a.txt"),
        ("hf://datasets/owner/name@main/a.txt", "hf://datasets/owner/name@main/a.txt"),
        ("/home/me@work/a.txt", "/home/me@work/a.txt"),
    ],
)
def test_a_url_without_credentials_keeps_its_place(url, label):
    assert without_credentials(url) == label


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/a", "https://host/a?X-Amz-Signature=s", "simplecache::s3://k:s@b/a"]
)
def test_credentials_are_detected(url):
    assert holds_credentials(url)


@pytest.mark.parametrize(
    "url", ["s3://bucket/a", "https://host/a?version=2", "abfs://container@account/a", "a@b"]
)
def test_a_url_without_credentials_is_accepted(url):
    assert not holds_credentials(url)


def test_secrets_in_a_message_are_replaced():
    message = "cannot open s3://key:secret@bucket/a and https://host/a?token=secret"
    assert without_secrets(message) == "cannot open s3://***@bucket/a and https://host/a?***"
