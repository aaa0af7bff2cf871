"""Sources behind HTTP servers: GGUF files are identified by their content, with and without range requests."""

import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from layerwise.tasks.sources.model_source import find_source


class Quiet(SimpleHTTPRequestHandler):
    """Sends the whole file even if a range is requested."""

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:
        try:
            super().copyfile(source, outputfile)
        except ConnectionError:
            """The client has closed the connection early."""


class WithParts(Quiet):
    """Sends the requested range of a file."""

    def do_GET(self) -> None:
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(params=[Quiet, WithParts])
def served(request, tmp_path) -> Iterator[tuple[str, Path]]:
    """URL of a server, and the folder that it serves."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path
        server.shutdown()


@pytest.mark.parametrize("size", [1000, 6 << 20])
def test_gguf_files_with_equal_names_sizes_and_times_are_distinguished_by_their_content(
    served, monkeypatch, tmp_path, size
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url, folder = served
    digests = set()
    for place in ("a", "b"):
        (folder / place).mkdir()
        (folder / place / "model.gguf").write_bytes(b"GGUF" + place.encode() * size)
        os.utime(folder / place / "model.gguf", (1e9, 1e9))
        source = find_source(f"{url}/{place}/model.gguf")
        digests.add(source.identity["gguf"][2].split()[0])  # without the time
        assert source.local_gguf().read_bytes() == b"GGUF" + place.encode() * size
    assert len(digests) == 2


@pytest.mark.parametrize("name", ["model", "model/", "model/config.json"])
def test_a_folder_behind_an_http_server_is_refused_with_what_to_do(served, name):
    url, folder = served
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"{url}/{name} cannot be used as a model: HTTP .* Give owner/name"):
        find_source(f"{url}/{name}")
