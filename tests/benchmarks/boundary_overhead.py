"""Cost of safety: the share of a search's wall time for checksums, resume points and fsync.

    .venv/bin/python tests/benchmarks/boundary_overhead.py --store /tmp/boundary_overhead

Runs the demo with an empty store. Exits with 1 if checksums and resume points take more than 5 % of the wall time. The
search writes a resume point every five minutes unless --boundary-minutes or --boundary-layers is given. In the demo
this gives only one after every shard of the import; use --boundary-layers 1 to measure the cost of a resume point.
"""

import argparse
import os
import pkgutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import xxhash

from layerwise import storage, tasks
from layerwise.flows import search as flow_module
from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.settings import Search
from layerwise.storage.draft import Draft
from layerwise.storage.files.filesystem import open_filesystem
from tests.demo_search import DEMO

LIMIT = 0.05
CHECKSUMS, RESUME_POINTS, FSYNC = "checksums", "resume points", "fsync"
OF_RESUME_POINTS = (
    "resume",
    "save_resume_point",
    "gather",
    "require_files",
    "remove_resume_point",
)  # methods of a draft


class Stopwatch:
    """Seconds by operation, separately for the main thread and for background threads.

    A checksum or an fsync within a resume point counts as checksum or fsync only, so that time is not counted twice.
    """

    def __init__(self) -> None:
        self.seconds: Counter[tuple[str, bool]] = Counter()
        self.calls: Counter[str] = Counter()
        self.in_resume_points = 0.0  # seconds of fsync within resume points
        self._here = threading.local()

    @property
    def safety(self) -> float:
        """Return the seconds of the main thread in checksums and resume points."""
        waited = self.seconds[CHECKSUMS, False] + self.seconds[RESUME_POINTS, False]
        return waited + self.in_resume_points

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        outer = getattr(self._here, "inside", None)
        self._here.inside, began, before = what, time.perf_counter(), getattr(self._here, "within", 0.0)
        self._here.within = 0.0  # seconds of nested measurements
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            background = threading.current_thread() is not threading.main_thread()
            self.seconds[what, background] += seconds - self._here.within
            self.calls[what] += 1
            if what == FSYNC and outer == RESUME_POINTS:
                self.in_resume_points += seconds
            self._here.inside, self._here.within = outer, before + seconds

    def timed(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            with self.measuring(what):
                return function(*args, **kwargs)

        return timing

    def hasher(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        """Return a class like xxh3_128 with timed updates."""
        watch = self

        class Hasher:
            def __init__(self, *data: Any) -> None:
                self._hasher = kind()
                for piece in data:
                    self.update(piece)

            def update(self, piece: Any) -> None:
                with watch.measuring(CHECKSUMS):
                    self._hasher.update(piece)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._hasher, name)

        return Hasher

    def install(self) -> None:
        """Start measuring."""
        os.fsync = self.timed(os.fsync, FSYNC)
        for name in OF_RESUME_POINTS:
            setattr(Draft, name, self.timed(getattr(Draft, name), RESUME_POINTS))
        replaced = {
            "xxh3_128_hexdigest": self.timed(xxhash.xxh3_128_hexdigest, CHECKSUMS),
            "xxh3_128": self.hasher(xxhash.xxh3_128),
        }
        for module in [*modules_of(storage), *modules_of(tasks)]:
            for name, replacement in replaced.items():
                if getattr(module, name, None) is getattr(xxhash, name):
                    setattr(module, name, replacement)


def modules_of(package: ModuleType) -> list[ModuleType]:
    modules = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [import_module(module.name) for module in modules]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="folder or URL that does not exist yet")
    parser.add_argument("--boundary-minutes", type=float)
    parser.add_argument("--boundary-layers", type=int)
    arguments = parser.parse_args()
    fs, root = open_filesystem(arguments.store)
    if fs.exists(root):
        sys.exit(
            f"{arguments.store} exists, but the search must compute everything. Give a new folder or URL."
        )
    server = ServerStart()
    server.wait()
    settings = Search.model_validate(DEMO)
    chosen = {name: value for name, value in vars(arguments).items() if value is not None}
    watch = Stopwatch()
    watch.install()
    began = time.monotonic()
    flow_module.search(settings, SearchRuntime(**chosen))
    total = time.monotonic() - began
    sys.stdout.write(report(watch, total))
    sys.exit(watch.safety > LIMIT * total)


def report(watch: Stopwatch, total: float) -> str:
    lines = [f"{total:.1f} s in total"]
    for what in (CHECKSUMS, RESUME_POINTS, FSYNC):
        waited, beside = watch.seconds[what, False], watch.seconds[what, True]
        lines.append(
            f"{what}: {watch.calls[what]} times, {waited:.2f} s = {100 * waited / total:.2f} %, and {beside:.2f} s "
            f"({100 * beside / total:.2f} %) in the background, in parallel with the computation"
        )
    lines.append(
        f"checksums and resume points, including {watch.in_resume_points:.2f} s of fsync: "
        f"{100 * watch.safety / total:.2f} % (at most {100 * LIMIT:.0f})"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
