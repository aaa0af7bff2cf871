"""Options of our S3 client: they outlive a storage outage of 20 seconds, which the defaults do not."""

from typing import Any

from fsspec.config import conf

RETRIES = 12  # of s3fs; an attribute of its file system, not an argument. Its own five give up within seconds
CLIENT_SETTINGS = {  # measured: STORAGE.md 5
    "retries": {"mode": "standard", "total_max_attempts": 10},
    "connect_timeout": 10,  # seconds
    "read_timeout": 60,  # seconds without a byte
}


def patient_s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments for s3fs: what the caller and the fsspec configuration say, and patience for the rest."""
    configured = {name: value for protocol in ("s3", "s3a") for name, value in conf.get(protocol, {}).items()}
    settings = {**configured, **options}
    return {
        "use_listings_cache": False,  # another machine may have written since
        "fixed_upload_size": True,  # some servers demand parts of one size
        **settings,
        "config_kwargs": CLIENT_SETTINGS | settings.get("config_kwargs", {}),
    }
