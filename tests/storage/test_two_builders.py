"""Several processes that build one stage concurrently: in any order of events, no work is lost."""

import pytest

from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.storage.artifact import Damaged
from layerwise.storage.draft import Draft
from layerwise.storage.files.errors import Unreachable
from layerwise.storage.stage import Stage
from layerwise.storage.upkeep.set_aside import set_aside

STAGE = Stage("capture", 1)


def state(number):
    return lambda draft: draft.write("state.bin", b"%d" % number)


def step_of(store):
    draft = store.draft(STAGE)
    draft.resume()
    return draft.resumed and draft.resumed.step


def test_a_later_resume_point_of_another_process_is_not_overwritten(store):
    fast, slow = store.draft(STAGE), store.draft(STAGE)

    def slow_state(draft):
        draft.write("state.bin", b"10")
        fast.save_resume_point(12, state(12))

    slow.save_resume_point(10, slow_state)
    assert step_of(store) == 12
    assert len([path for path in store.fs.find(store.root) if path.endswith("state.bin")]) == 1


def test_a_resume_point_replaced_during_the_check_of_its_files_is_used(store, monkeypatch):
    other, draft = store.draft(STAGE), store.draft(STAGE)
    other.save_resume_point(12, state(12))
    look = draft._current_resume_point

    def then_replaced():
        progress = look()
        if progress.step == 12:
            other.save_resume_point(14, state(14))
        return progress

    monkeypatch.setattr(draft, "_current_resume_point", then_replaced)
    draft.resume()
    assert draft.resumed.step == 14


def test_only_one_of_two_processes_sets_an_artifact_aside(store, monkeypatch):
    artifact = store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", b"x"))
    damaged = Damaged("its file is damaged", artifact.key, artifact.token)
    cat_file, others = store.fs.cat_file, []

    def after_the_other(path, **span):
        content = cat_file(path, **span)
        if not others:
            others.append("is asked")
            others.append(set_aside(store, damaged))
        return content

    monkeypatch.setattr(store.fs, "cat_file", after_the_other)
    assert not set_aside(store, damaged)
    assert others == ["is asked", True]


def build_in_steps(draft):
    for layer in range(draft.resumed.step if draft.resumed else 0, 4):
        draft.write(f"layer-{layer}", b"content %d" % layer)
        if layer == 2:
            draft.save_resume_point(3, state(3))


def killed(draft):
    raise RuntimeError("killed")


def test_a_resume_point_left_next_to_the_manifest_does_not_bring_back_the_damaged_file(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "remove_resume_point", killed)
        with pytest.raises(RuntimeError, match="killed"):
            store.get_or_build(STAGE, build_in_steps)
    artifact = store.get(STAGE.key)
    store.fs.pipe_file(f"{store.root}/{artifact.files['layer-1'].path}", b"cOntent 1")

    def read():
        artifact = store.get_or_build(STAGE, build_in_steps)
        return [store.read(artifact, f"layer-{layer}") for layer in range(4)]

    assert rebuild_damaged(store, read) == [b"content %d" % layer for layer in range(4)]


def test_an_inherited_file_that_is_missing_at_the_commit_is_rebuilt(store):
    attempts = []

    def build(draft):
        attempts.append(draft.resumed and draft.resumed.step)
        if len(attempts) == 1:
            draft.write("layer-0", b"zero")
            draft.save_resume_point(1, state(1))
            raise RuntimeError("killed")
        if draft.resumed:
            store.fs.rm_file(f"{store.root}/{draft.files['layer-0'].path}")
        else:
            draft.write("layer-0", b"zero")
        draft.write("layer-1", b"one")

    with pytest.raises(RuntimeError, match="killed"):
        store.get_or_build(STAGE, build)
    artifact = store.get_or_build(STAGE, build)
    assert attempts == [None, 1, None]
    assert [store.read(artifact, name) for name in ("layer-0", "layer-1")] == [b"zero", b"one"]


def test_check_inherited_detects_a_damaged_file_of_an_earlier_attempt(store):
    attempts = []

    def build(draft):
        attempts.append(draft.resumed and draft.resumed.step)
        if draft.resumed is None:
            file = draft.write("layer-0", b"zero")
            draft.save_resume_point(1, state(1))
            if len(attempts) == 1:
                store.fs.pipe_file(f"{store.root}/{file.path}", b"zerO")
                raise RuntimeError("killed")
        draft.save_resume_point(2, state(2))  # it also names the damaged file
        draft.check_inherited()

    with pytest.raises(RuntimeError, match="killed"):
        store.get_or_build(STAGE, build)
    artifact = store.get_or_build(STAGE, build)
    assert attempts == [None, 1, None]
    assert store.read(artifact, "layer-0") == b"zero"


@pytest.mark.parametrize("document", ["manifest.json", "progress.json"])
def test_truncated_answers_are_not_reported_as_damage(store, monkeypatch, document):
    if document == "manifest.json":
        store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", b"x"))
    else:
        store.draft(STAGE).save_resume_point(40, state(40))
    cat_file = store.fs.cat_file

    def short(path, *span, **named):
        content = cat_file(path, *span, **named)
        return content[:-20] if path.endswith(document) else content

    monkeypatch.setattr(store.fs, "cat_file", short)
    with pytest.raises(Unreachable, match=rf"{document} arrives as \d+ bytes, although it has \d+"):
        store.get_or_build(STAGE, killed)
    monkeypatch.undo()
    assert (store.find(STAGE) is not None) == (document == "manifest.json")
    assert step_of(store) == (None if document == "manifest.json" else 40)
