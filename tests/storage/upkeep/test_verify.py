"""Verification: damage to any file of a store is found and attributed to the right artifact."""

import random
import shutil
import uuid

import pytest

from layerwise.storage.files.errors import Unreachable
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.signs_of_life import storage_clock
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import collect, plan_collection
from layerwise.storage.upkeep.verify import Tally, verify

CHECKPOINT = Stage("import", 1)
CAPTURE = Stage("capture", 1, inputs={"checkpoint": CHECKPOINT.key})
EXPORT = Stage("export", 1, inputs={"checkpoint": CHECKPOINT.key, "capture": CAPTURE.key})
BRANCH = Stage("branch", 1, settings={"beta": 0.1}, inputs={"capture": CAPTURE.key})
SHARDS = ("layer-0.safetensors", "layer-1.safetensors", "tables/statistics.parquet")


class Killed(BaseException):
    """The process was killed and did not clean up."""


def fill(store):
    """Build three artifacts and the resume point of a fourth; all files differ."""
    numbers = random.Random(7)
    for stage in (CHECKPOINT, CAPTURE, EXPORT):

        def build(draft):
            for name in SHARDS:
                draft.write(name, numbers.randbytes(numbers.randint(200, 900)))

        store.get_or_build(stage, build)

    def killed(draft):
        for layer in range(2):
            draft.write(f"layer-{layer}.safetensors", numbers.randbytes(300))
            draft.save_resume_point(layer + 1, lambda state: state.write("state.bin", numbers.randbytes(400)))
        raise Killed

    with pytest.raises(Killed):
        store.get_or_build(BRANCH, killed)


def paths_in(store):
    rows = store.fs.find(store.root, detail=True)
    return sorted(path for path, row in rows.items() if row["type"] == "file")


def key_of(store, path):
    return "/".join(path.removeprefix(f"{store.root}/").split("/")[:2])


def test_an_intact_store_has_no_findings_and_is_read_completely(store):
    fill(store)
    tally = Tally()
    assert list(verify(store, tally)) == []
    counted = [path for path in paths_in(store) if not path.endswith(("manifest.json", "progress.json"))]
    assert (tally.folders, tally.artifacts, tally.resume_points, tally.files) == (4, 3, 1, len(counted))
    assert tally.bytes == sum(store.fs.info(path)["size"] for path in counted)


def test_an_empty_store_has_no_findings(store):
    assert list(verify(store)) == []


def test_a_file_larger_than_the_buffer_is_read_completely(store, monkeypatch):
    monkeypatch.setattr("layerwise.storage.files.reading.ORDERED_PIECE", 1000)
    artifact = store.get_or_build(CAPTURE, lambda draft: draft.write("large.bin", bytes(2500)))
    assert list(verify(store)) == []
    path = f"{store.root}/{artifact.files['large.bin'].path}"
    overwrite(store.fs, path, bytes(2499) + b"\1")
    [finding] = verify(store)
    assert (finding.key, finding.name, finding.kind) == (CAPTURE.key, "large.bin", "damaged")


def one_of(numbers, paths):
    """Choose a file; each name is equally likely, although there are more shards than resume points."""
    name = numbers.choice(sorted({path.name for path in paths}))
    return numbers.choice([path for path in paths if path.name == name])


def flip_a_bit(numbers, paths):
    path = one_of(numbers, paths)
    content = bytearray(path.read_bytes())
    content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
    path.write_bytes(content)
    return [path]


def truncate(numbers, paths):
    path = one_of(numbers, paths)
    path.write_bytes(path.read_bytes()[: numbers.randrange(path.stat().st_size)])
    return [path]


def delete(numbers, paths):
    path = one_of(numbers, paths)
    path.unlink()
    return [path]


def swap(numbers, paths):
    first = one_of(numbers, paths)
    second = one_of(numbers, [path for path in paths if path != first])
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return [first, second]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, delete, swap])
def test_every_random_damage_is_found_and_named(tmp_path, monkeypatch, damage):
    """25 damages of each kind, to shards, tables, manifests, the resume point and its state."""
    # A local disk returns the same bytes again.
    monkeypatch.setattr("layerwise.storage.formats.document.ATTEMPTS", 1)
    whole = ArtifactStore(str(tmp_path / "whole"))
    fill(whole)
    numbers = random.Random(damage.__name__)
    hit = set()
    for number in range(25):
        store = ArtifactStore(str(tmp_path / str(number)))
        shutil.copytree(whole.root, store.root)
        files = [path for path in (tmp_path / str(number)).rglob("*") if path.is_file()]
        # Not sorted by the whole path: it contains random names of attempts, which would undo the seed.
        damaged = damage(numbers, sorted(files, key=lambda path: (key_of(store, str(path)), path.name)))
        findings = list(verify(store))
        assert {finding.key for finding in findings} == {key_of(store, str(path)) for path in damaged}, (
            damaged
        )
        lost = {key_of(store, str(path)) for path in damaged if path.suffix == ".json"}
        for path in damaged:
            # The files of a damaged manifest or resume point are unknown, so the finding names the document.
            told = [each.name + each.problem for each in findings if each.key == key_of(store, str(path))]
            names = ("manifest.json", "progress.json") if key_of(store, str(path)) in lost else (path.name,)
            assert any(name in each for each in told for name in names), (path, findings)
        hit |= {path.name for path in damaged}
    assert {"manifest.json", "state.bin", "layer-0.safetensors", "statistics.parquet"} <= hit


def damage_on_any_backend(store, artifact):
    paths = {name: f"{store.root}/{file.path}" for name, file in artifact.files.items()}
    store.fs.rm_file(paths[SHARDS[0]])
    content = store.fs.cat_file(paths[SHARDS[1]])
    overwrite(store.fs, paths[SHARDS[1]], content[:-1])
    content = store.fs.cat_file(paths[SHARDS[2]])
    overwrite(store.fs, paths[SHARDS[2]], content[:-1] + bytes([content[-1] ^ 1]))


def test_missing_truncated_and_changed_files_are_distinguished(store):
    fill(store)
    damage_on_any_backend(store, store.get(CAPTURE.key))
    overwrite(store.fs, f"{store.root}/{EXPORT.key}/manifest.json", b'{"format": 1')
    tally = Tally()
    found = {(finding.key, finding.name): finding for finding in verify(store, tally)}
    assert {finding.kind for finding in found.values()} == {"damaged"}
    assert found.keys() == {(CAPTURE.key, name) for name in SHARDS} | {(EXPORT.key, "manifest.json")}
    problems = [found[CAPTURE.key, name].problem for name in SHARDS]
    assert problems[0].endswith("is missing")
    assert "bytes, but" in problems[1]
    assert "digest" in problems[2]
    assert "is not readable" in found[EXPORT.key, "manifest.json"].problem
    assert tally.artifacts == 3


def test_a_lost_manifest_is_found_by_an_artifact_made_from_it(store):
    fill(store)
    store.fs.rm_file(f"{store.root}/{CAPTURE.key}/manifest.json")
    [finding] = verify(store)
    assert (finding.key, finding.name, finding.kind) == (CAPTURE.key, "manifest.json", "damaged")
    assert f"{BRANCH.key.partition('/')[0]}/" in finding.problem or EXPORT.key in finding.problem


def test_files_of_a_killed_attempt_are_not_damage(store):
    overwrite(store.fs, f"{store.root}/{CAPTURE.key}/{uuid.uuid4().hex}/layer-0.bin", b"x")
    [finding] = verify(store)
    assert (finding.key, finding.kind) == (CAPTURE.key, "unfinished")


def test_deleted_inputs_are_not_damage(store):
    fill(store)
    now = storage_clock(store) + 86400.0
    collect(store, plan_collection(store, lambda artifacts: {EXPORT.key}, now=now))
    tally = Tally()
    assert list(verify(store, tally)) == []
    assert tally.artifacts == 1


def test_a_storage_that_fails_is_not_reported_as_damage(store, monkeypatch):
    fill(store)
    path = store.get(CAPTURE.key).files[SHARDS[1]].path
    read = store.fs.info

    def failing(asked, *args, **kwargs):
        if path in str(asked):
            raise Unreachable("the server does not answer")
        return read(asked, *args, **kwargs)

    monkeypatch.setattr(store.fs, "info", failing)
    [finding] = verify(store)
    assert (finding.key, finding.name, finding.kind) == (CAPTURE.key, SHARDS[1], "unread")
    assert finding.problem.endswith("could not be read: the server does not answer")


def test_a_resume_point_that_is_replaced_while_it_is_read_is_not_damage(store, monkeypatch):
    fill(store)
    info, replaced = store.fs.info, []

    def replacing(asked, *args, **kwargs):
        if "state.bin" in str(asked) and not replaced:
            replaced.append(asked)
            store.get_or_build(BRANCH, lambda draft: draft.write("last.bin", b"x"))
            assert not store.fs.exists(asked)
        return info(asked, *args, **kwargs)

    monkeypatch.setattr(store.fs, "info", replacing)
    assert list(verify(store)) == []
    assert replaced


def test_nothing_is_written(store):
    fill(store)
    damage_on_any_backend(store, store.get(CAPTURE.key))
    before = {path: store.fs.info(path) for path in paths_in(store)}
    assert len(list(verify(store))) == 3
    assert {path: store.fs.info(path) for path in paths_in(store)} == before
