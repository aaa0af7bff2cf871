"""Several processes on one stage at once: whatever the order of events, nothing is lost, and nobody is disturbed."""

import pytest

from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.storage.damage import Damaged
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


def test_progress_that_another_makes_while_the_state_is_written_stays(store):
    fast, slow = store.draft(STAGE), store.draft(STAGE)

    def slow_state(draft):
        draft.write("state.bin", b"10")
        fast.save_progress(12, state(12))

    slow.save_progress(10, slow_state)
    assert step_of(store) == 12
    assert len([path for path in store.fs.find(store.root) if path.endswith("state.bin")]) == 1


def test_a_resume_point_that_is_replaced_while_its_files_are_looked_for_is_followed(store, monkeypatch):
    other, draft = store.draft(STAGE), store.draft(STAGE)
    other.save_progress(12, state(12))
    look = draft._standing

    def then_replaced():
        progress = look()
        if progress.step == 12:
            other.save_progress(14, state(14))
        return progress

    monkeypatch.setattr(draft, "_standing", then_replaced)
    draft.resume()
    assert draft.resumed.step == 14


def test_of_two_that_set_the_same_artifact_aside_one_does(store, monkeypatch):
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
            draft.save_progress(3, state(3))


def killed(draft):
    raise RuntimeError("killed")


def test_a_resume_point_left_beside_the_manifest_does_not_lead_to_the_damaged_file(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Draft, "remove_progress", killed)
        with pytest.raises(RuntimeError, match="killed"):
            store.get_or_build(STAGE, build_in_steps)
    artifact = store.get(STAGE.key)
    store.fs.pipe_file(f"{store.root}/{artifact.files['layer-1'].path}", b"cOntent 1")

    def read():
        artifact = store.get_or_build(STAGE, build_in_steps)
        return [store.read(artifact, f"layer-{layer}") for layer in range(4)]

    assert rebuild_damaged(store, read) == [b"content %d" % layer for layer in range(4)]


def test_an_inherited_file_that_is_gone_at_the_commit_is_made_again(store):
    attempts = []

    def build(draft):
        attempts.append(draft.resumed and draft.resumed.step)
        if len(attempts) == 1:
            draft.write("layer-0", b"zero")
            draft.save_progress(1, state(1))
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


def test_a_file_of_an_earlier_attempt_is_read_through_where_nobody_else_would(store):
    attempts = []

    def build(draft):
        attempts.append(draft.resumed and draft.resumed.step)
        if draft.resumed is None:
            file = draft.write("layer-0", b"zero")
            draft.save_progress(1, state(1))
            if len(attempts) == 1:
                store.fs.pipe_file(f"{store.root}/{file.path}", b"zerO")
                raise RuntimeError("killed")
        draft.save_progress(2, state(2))  # which names the damaged file, too
        draft.check_inherited()

    with pytest.raises(RuntimeError, match="killed"):
        store.get_or_build(STAGE, build)
    artifact = store.get_or_build(STAGE, build)
    assert attempts == [None, 1, None]
    assert store.read(artifact, "layer-0") == b"zero"


@pytest.mark.parametrize("document", ["manifest.json", "progress.json"])
def test_answers_that_come_short_are_not_taken_for_damage(store, monkeypatch, document):
    if document == "manifest.json":
        store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", b"x"))
    else:
        store.draft(STAGE).save_progress(40, state(40))
    cat_file = store.fs.cat_file

    def short(path, *span, **named):
        content = cat_file(path, *span, **named)
        return content[:-20] if path.endswith(document) else content

    monkeypatch.setattr(store.fs, "cat_file", short)
    with pytest.raises(Unreachable, match=rf"{document} comes as \d+ bytes, although it has \d+"):
        store.get_or_build(STAGE, killed)
    monkeypatch.undo()
    assert (store.find(STAGE) is not None) == (document == "manifest.json")
    assert step_of(store) == (None if document == "manifest.json" else 40)
