"""What a search ran on: versions of Python and of the packages that may change a number."""

import platform
from importlib.metadata import version

PACKAGES = (
    "layerwise-pruning",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pyarrow",
    "prefect",
)


def versions() -> dict[str, str]:
    """Versions by name, of this process."""
    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine(), **packages}
