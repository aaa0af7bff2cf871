"""Which lanes run together: groups that an earlier attempt has begun go on as they are, the others are made anew.

The tasks of a zero-shot evaluation run together in the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Committed, Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

MOST_PLANS = 255  # in one group: a ranking stores one byte per weight (layerwise.pruners.masks)
GROUP = "group"  # in a lane's resume point: the keys of the lanes it runs with; in how it was made: their group's key


def group_stage(lanes: Sequence[Stage]) -> Stage:
    """The stage that runs these lanes together."""
    return Stage(
        f"{lanes[0].name}_group", 1, None, {f"lane {number}": lane.key for number, lane in enumerate(lanes)}
    )


def built_together(
    store: ArtifactStore,
    stages: Sequence[Stage],
    run: Callable[[Sequence[int]], Artifact],
    copy: Callable[[Artifact, int, int, Draft], None],
) -> list[Artifact]:
    """Build what the store lacks of ``stages`` in one group; groups that were begun before go on as they are.

    Args:
        run: builds the group of the stages with these numbers.
        copy: writes one member: from the group's artifact, its position in the group, the number of its stage, into
            its own draft.

    Returns:
        The artifacts of all ``stages``, in their order.
    """
    while None in (artifacts := [store.find(stage) for stage in stages]):
        missing = [number for number, artifact in enumerate(artifacts) if artifact is None]
        members = next(begun_groups(store, stages, missing), None)
        if members is None:
            members = missing
            try:
                note_group(store, [stages[number] for number in members])
            except Committed:
                continue  # another process has just finished one of them
        group = run(members)
        for position, number in enumerate(members):
            if number in missing:
                store.get_or_build(stages[number], partial(copy, group, position, number))
    return [artifact for artifact in artifacts if artifact is not None]


def copy_member(store: ArtifactStore, group: Artifact, folder: str, draft: Draft) -> None:
    """Write the files of one member, which lie in ``folder`` (ends with "/") of its group's artifact, as its own."""
    for name in group.files:
        if name.startswith(folder):
            draft.write(name.removeprefix(folder), store.read(group, name))


def begun_groups(store: ArtifactStore, lanes: Sequence[Stage], missing: Sequence[int]) -> Iterator[list[int]]:
    """Groups that an earlier attempt has brought to a resume point, each as the numbers of its lanes.

    With whom a lane was begun is noted in its resume point, so that a group goes on even if some of its lanes are
    committed already, or others have been asked for since. No missing lane is in two of the groups.

    Args:
        lanes: all that are asked for.
        missing: numbers of those that the store does not have.
    """
    left = set(missing)
    for members in [list(range(len(lanes))), *(_noted_group(store, lanes, number) for number in missing)]:
        if left.intersection(members) and _has_progress(store, [lanes[number] for number in members]):
            yield members
            left -= set(members)


def note_group(store: ArtifactStore, lanes: Sequence[Stage]) -> None:
    """Note in every lane's resume point that these are begun together.

    Raises:
        Committed: another process has finished one of them.
    """
    together = [lane.key for lane in lanes]

    def note(state: Draft) -> None:
        state.facts[GROUP] = together

    for lane in lanes:
        store.draft(lane).save_resume_point(0, note)


def split_evenly(lanes: Sequence[int], count: int) -> list[list[int]]:
    """``lanes`` in their order, in ``count`` groups or one for each lane; their sizes differ by one at most."""
    count = min(count, len(lanes))
    size, larger = divmod(len(lanes), max(count, 1))
    starts = [number * size + min(number, larger) for number in range(count + 1)]
    return [list(lanes[start:end]) for start, end in zip(starts, starts[1:], strict=False)]


def _noted_group(store: ArtifactStore, lanes: Sequence[Stage], lane: int) -> list[int]:
    """The lanes that this one was begun with; none if one of them is not asked for any more."""
    progress = store.resume_point(lanes[lane])
    keys = [] if progress is None else cast(list[str], progress.state.facts[GROUP])
    number_of = {stage.key: number for number, stage in enumerate(lanes)}
    return [number_of[key] for key in keys] if all(key in number_of for key in keys) else []


def _has_progress(store: ArtifactStore, lanes: Sequence[Stage]) -> bool:
    group = group_stage(lanes)
    return store.find(group) is not None or store.resume_point(group) is not None
