"""Resume points: work done before a crash is kept, and the resume points are deleted after the commit."""

import logging

import pytest
import torch

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.stage import Stage
from layerwise.storage.tensors import read_tensors, write_tensors

STAGE = Stage("capture", version=1)


def progress_path(store):
    return f"{store.root}/{STAGE.key}/progress.json"


def write_total(state, total):
    write_tensors(state, "state.safetensors", {"total": total})


def build_layers(store, num_layers=4, crash_after=None, built=None):
    """Build one file for each layer, with a running sum as state; optionally crash after a layer."""

    def build(draft):
        first, total = 0, torch.zeros(1)
        if draft.resumed:
            first = draft.resumed.step
            total = read_tensors(store, draft.resumed.state, "state.safetensors")["total"].clone()
        for layer in range(first, num_layers):
            total += layer
            draft.write(f"layer-{layer}.bin", f"{total.item():.0f}".encode())
            draft.facts[f"layer {layer}"] = total.item()
            draft.save_resume_point(layer + 1, lambda state, total=total: write_total(state, total))
            if built is not None:
                built.append(layer)
            if layer == crash_after:
                raise RuntimeError("the machine is lost")

    return store.get_or_build(STAGE, build)


def crash(store, after, **kwargs):
    with pytest.raises(RuntimeError, match="the machine is lost"):
        build_layers(store, crash_after=after, **kwargs)


def test_a_second_attempt_continues_where_the_first_one_stopped(store):
    built = []
    crash(store, 1, built=built)
    assert store.find(STAGE) is None
    artifact = build_layers(store, built=built)
    assert built == [0, 1, 2, 3]
    assert [store.read(artifact, f"layer-{layer}.bin") for layer in range(4)] == [b"0", b"1", b"3", b"6"]
    assert artifact.facts == {"layer 0": 0, "layer 1": 1, "layer 2": 3, "layer 3": 6}


def test_an_interrupted_build_has_the_same_content_as_an_uninterrupted_one(store):
    crash(store, 2)
    resumed = build_layers(store)
    store.fs.rm_file(f"{store.root}/{STAGE.key}/manifest.json")
    assert build_layers(store).content == resumed.content


def test_a_resumed_attempt_writes_into_a_folder_of_its_own(store):
    crash(store, 0)
    artifact = build_layers(store)
    folders = [artifact.files[f"layer-{layer}.bin"].path.rsplit("/", 1)[0] for layer in range(4)]
    assert folders[0] != folders[1] == folders[2] == folders[3]
    assert store.location(artifact).endswith(STAGE.key)


def test_only_the_newest_state_is_kept_and_nothing_after_the_commit(store):
    crash(store, 2)
    states = [path for path in store.fs.find(store.root) if path.endswith("state.safetensors")]
    assert len(states) == 1
    build_layers(store)
    names = sorted(path.rsplit("/", 1)[1] for path in store.fs.find(store.root))
    assert names == ["layer-0.bin", "layer-1.bin", "layer-2.bin", "layer-3.bin", "manifest.json"]


def test_a_crash_while_the_state_is_written_keeps_the_previous_resume_point(store):
    crash(store, 0)

    def dies_while_saving(draft):
        draft.write("layer-1.bin", b"1")
        draft.save_resume_point(2, lambda state: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        store.get_or_build(STAGE, dies_while_saving)
    built = []
    build_layers(store, built=built)
    assert built == [1, 2, 3]


def truncate_state(store):
    [state] = [path for path in store.fs.find(store.root) if path.endswith("state.safetensors")]
    store.fs.pipe_file(state, store.fs.cat_file(state)[:-1])


def remove_layer(store):
    [layer] = [path for path in store.fs.find(store.root) if path.endswith("layer-0.bin")]
    store.fs.rm_file(layer)


def break_progress(store):
    store.fs.pipe_file(progress_path(store), store.fs.cat_file(progress_path(store))[:-9])


def empty_progress(store):
    store.fs.pipe_file(progress_path(store), b"")


def flip_a_byte_of_the_state(store):
    (path,) = [
        path for path in store.fs.find(f"{store.root}/{STAGE.key}") if path.endswith("state.safetensors")
    ]
    content = store.fs.cat_file(path)
    store.fs.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_byte_of_the_state, "state.safetensors: tensor 'total' has digest"),
        (truncate_state, "state.safetensors has"),
        (remove_layer, "layer-0.bin is missing"),
        (break_progress, "progress.json is not readable"),
        (empty_progress, "progress.json is not readable"),
    ],
)
def test_a_damaged_resume_point_is_not_used_and_named_in_a_warning(store, damage, named, caplog):
    crash(store, 1)
    damage(store)
    built = []
    with caplog.at_level(logging.WARNING):
        artifact = build_layers(store, built=built)
    assert built == [0, 1, 2, 3]
    assert store.read(artifact, "layer-3.bin") == b"6"
    assert "resume point" in caplog.text
    assert named in caplog.text
    assert not store.fs.exists(progress_path(store))


def test_an_attempt_may_write_an_inherited_file_again(store):
    crash(store, 0)

    def build(draft):
        assert draft.resumed.step == 1
        draft.write("layer-0.bin", b"new")

    assert store.read(store.get_or_build(STAGE, build), "layer-0.bin") == b"new"


def test_a_slower_builder_does_not_delete_files_of_the_winner(store):
    def slow(draft):
        draft.write("layer-0.bin", b"0")
        draft.save_resume_point(1, lambda state: state.write("state.bin", b"s"))
        build_layers_after_state(store)
        draft.save_resume_point(2, lambda state: state.write("state.bin", b"s"))

    def build_layers_after_state(store):
        def fast(draft):
            assert store.read(draft.resumed.state, "state.bin") == b"s"
            draft.write("layer-1.bin", b"1")

        store.get_or_build(STAGE, fast)

    artifact = store.get_or_build(STAGE, slow)
    assert [store.read(artifact, name) for name in ("layer-0.bin", "layer-1.bin")] == [b"0", b"1"]


def test_a_slower_process_keeps_the_resume_point_of_the_faster_one(store):
    """Two processes build one stage; the progress of the faster one is kept."""

    def slow(draft):
        crash(store, 2)  # another process that progressed further and died
        draft.write("layer-0.bin", b"0")
        draft.save_resume_point(1, lambda state: write_total(state, torch.zeros(1)))
        raise RuntimeError("lost as well")

    with pytest.raises(RuntimeError, match="lost as well"):
        store.get_or_build(STAGE, slow)
    built = []
    build_layers(store, built=built)
    assert built == [3]


def test_a_resume_point_that_another_process_replaces_is_used(store):
    """The state is deleted after the resume point was read; then the newer resume point is used."""
    crash(store, 0)
    steps = []

    def build(draft):
        steps.append(draft.resumed.step)
        if len(steps) == 1:
            crash(store, 2)
        store.read(draft.resumed.state, "state.safetensors")

    store.get_or_build(STAGE, build)
    assert steps == [1, 3]


def test_a_build_ends_when_another_process_has_committed(store):
    done = []

    def slow(draft):
        draft.save_resume_point(1, lambda state: write_total(state, torch.zeros(1)))
        done.append(build_layers(store))
        draft.save_resume_point(2, lambda state: write_total(state, torch.zeros(1)))
        raise AssertionError("nobody needs this work any more")

    assert store.get_or_build(STAGE, slow) == done[0]
    names = {path.rsplit("/", 1)[1] for path in store.fs.find(store.root)}
    assert "progress.json" not in names
    assert "state.safetensors" not in names


def test_an_artifact_whose_file_was_deleted_is_not_committed(store):
    def build(draft):
        file = draft.write("layer-0.bin", b"0")
        store.fs.rm_file(f"{store.root}/{file.path}")

    with pytest.raises(Corrupt, match=r"its files were deleted 4 times, the last time .*layer-0\.bin"):
        store.get_or_build(STAGE, build)
    assert store.find(STAGE) is None
