"""Start of a search in a store with 100,000 objects, compared with an empty store.

    .venv/bin/python tests/benchmarks/big_store.py --store /tmp/big_store
    .venv/bin/python tests/benchmarks/big_store.py --store s3://bucket/big_store

Measures the store operations at the start of a search, in turns in both stores: lookups of existing and missing stages,
the build of one stage, and a sign of life. Exits with 1 if the full store takes more than 1.5 times as long.
"""

import argparse
import statistics
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from layerwise.storage.draft import Draft
from layerwise.storage.files.filesystem import is_local
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

ROUNDS = 15
LOOKUPS = 20
LIMIT = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="folder or URL that does not exist yet")
    parser.add_argument("--objects", type=int, default=100_000)
    arguments = parser.parse_args()
    empty, full = (ArtifactStore(f"{arguments.store}/{name}") for name in ("empty", "full"))
    began = time.monotonic()
    fill(full, arguments.objects)
    print(f"{arguments.objects} objects written in {time.monotonic() - began:.0f} s")
    seconds: dict[str, list[float]] = {"empty": [], "full": []}
    for round_number in range(ROUNDS):
        for name, store in (("empty", empty), ("full", full)):
            began = time.monotonic()
            start(ArtifactStore(store.url), round_number)
            seconds[name].append(time.monotonic() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["full"] / medians["empty"]
    print(
        f"{LOOKUPS} lookups, a build and an announcement: empty {1000 * medians['empty']:.0f} ms, "
        f"full {1000 * medians['full']:.0f} ms, ratio {ratio:.2f} (at most {LIMIT})"
    )
    sys.exit(ratio > LIMIT)


def fill(store: ArtifactStore, objects: int) -> None:
    """Write artifacts of earlier runs to the folder of one stage: a manifest and nine files each."""
    per_artifact = 10

    def write(number: int) -> None:
        folder = f"{store.root}/lane/{number:032x}"
        if number == 0:
            store.get_or_build(Stage("lane", 1, "first"), write_one_byte)
        for name in ["manifest.json", *(f"{uuid.uuid4().hex}/{n}" for n in range(per_artifact - 1))]:
            path = f"{folder}/{name}"
            if is_local(store.fs):
                store.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            store.fs.pipe_file(path, b"{}")

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(write, range(objects // per_artifact)))


def start(store: ArtifactStore, round_number: int) -> None:
    """Do the store operations of a search before it computes anything."""
    with announced(store, "benchmark"):
        for number in range(LOOKUPS):
            store.find(Stage("lane", 1, number))
        store.get_or_build(Stage("lane", 1, ["round", round_number]), write_one_byte)


def write_one_byte(draft: Draft) -> None:
    draft.write("x", b"x")


if __name__ == "__main__":
    main()
