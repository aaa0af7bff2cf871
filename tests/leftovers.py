"""Leftovers of killed attempts in a store, and garbage collection as of a day from now."""

import os
from pathlib import Path

import pytest

from layerwise.storage.signs_of_life import storage_clock
from layerwise.storage.stage import Stage
from layerwise.storage.upkeep.garbage_collection import collect, plan_collection

DAY = 86400.0
STAGE = Stage("capture", 1)
OTHER = Stage("branch", 1, settings={"beta": 0.1}, inputs={"capture": STAGE.key})


class Killed(BaseException):
    """End of a process without any cleanup."""


def paths_in(store):
    prefix = f"{store.root}/"
    rows = store.fs.find(store.root, detail=True)
    return {path.removeprefix(prefix) for path, row in rows.items() if row["type"] == "file"}


def plan(store, later=DAY, **kwargs):
    """Plan the garbage collection of a later time, by default in a day, when all files are old."""
    return plan_collection(store, now=storage_clock(store) + later, **kwargs)


def collect_all(store, **kwargs):
    collected = collect(store, plan(store, **kwargs))
    assert collected.failures == ()
    return collected


def kinds_of(collection):
    return {each.kind for each in collection.garbage}


def build_weights(store, stage=STAGE, content=b"wwww"):
    return store.get_or_build(stage, lambda draft: draft.write("weights.bin", content))


def die_in_attempt(store, stage=STAGE, resume_points=0):
    """Run an attempt that is killed after ``resume_points`` resume points, in the middle of a layer."""

    def build(draft):
        for layer in range(resume_points):
            draft.write(f"layer-{layer}.bin", b"layer")
            draft.save_resume_point(layer + 1, lambda state: state.write("state.bin", b"state"))
        draft.write("layer-unnamed.bin", b"layer")
        raise Killed

    with pytest.raises(Killed):
        store.get_or_build(stage, build)


def make_old(folder):
    """Set the modification times of everything in ``folder`` to 2001."""
    for path in Path(folder).rglob("*"):
        os.utime(path, (1e9, 1e9))


def files_in(folder):
    """Return the content of every file by path."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
