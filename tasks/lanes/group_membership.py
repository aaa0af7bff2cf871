"""Membership of lanes in groups: groups that an earlier attempt has started are resumed, the rest form a new group.

The tasks of a zero-shot evaluation are grouped in the same way.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Committed, Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

MOST_PLANS = 255  # in one group: a ranking stores one byte per weight (layerwise.pruners.masks)
GROUP = "group"  # in a lane's resume point: keys of all lanes of its group; in a lane's ``made``: key of the group


def group_stage(lanes: Sequence[Stage]) -> Stage:
    """Describe the group of these lanes."""
    return Stage(
        f"{lanes[0].name}_group", 2, None, {f"lane {number}": lane.key for number, lane in enumerate(lanes)}
    )


def built_together(
    store: ArtifactStore,
    stages: Sequence[Stage],
    run: Callable[[Sequence[int]], Artifact],
    copy: Callable[[Artifact, int, int, Draft], None],
) -> list[Artifact]:
    """Build those of ``stages`` that the store lacks in one group, after resuming groups that were started before.

    Args:
        run: builds the group of the stages with the given numbers.
        copy: writes one member into its own draft, given the artifact of the group, the member's position in the
            group, and the number of its stage.

    Returns:
        The artifacts of all ``stages``, in order.
    """
    while None in (artifacts := [store.find(stage) for stage in stages]):
        missing = [number for number, artifact in enumerate(artifacts) if artifact is None]
        members = next(begun_groups(store, stages, missing), None)
        if members is None:
            members = missing
            try:
                note_group(store, [stages[number] for number in members])
            except Committed:
                continue  # another process has just finished one of these lanes
        group = run(members)
        for position, number in enumerate(members):
            if number in missing:
                store.get_or_build(stages[number], partial(copy, group, position, number))
    return [artifact for artifact in artifacts if artifact is not None]


def copy_member(store: ArtifactStore, group: Artifact, folder: str, draft: Draft) -> None:
    """Copy the files of one member from its ``folder`` (ends with "/") of the group into its own draft."""
    for name in group.files:
        if name.startswith(folder):
            draft.write(name.removeprefix(folder), store.read(group, name))


def begun_groups(store: ArtifactStore, lanes: Sequence[Stage], missing: Sequence[int]) -> Iterator[list[int]]:
    """Find the groups for which an earlier attempt left a resume point.

    The resume point of every lane names its group, so a group can be resumed even if some of its lanes are committed,
    or if more lanes have been requested since.

    Args:
        lanes: all requested lanes.
        missing: numbers of the lanes that the store lacks.

    Yields:
        The numbers of the lanes of one group. Every missing lane is in at most one group.
    """
    left = set(missing)
    for members in [list(range(len(lanes))), *(_noted_group(store, lanes, number) for number in missing)]:
        if left.intersection(members) and _has_progress(store, [lanes[number] for number in members]):
            yield members
            left -= set(members)


def note_group(store: ArtifactStore, lanes: Sequence[Stage]) -> None:
    """Record the group of these lanes in the resume point of each.

    Raises:
        Committed: another process has finished one of the lanes.
    """
    together = [lane.key for lane in lanes]

    def note(state: Draft) -> None:
        state.facts[GROUP] = together

    for lane in lanes:
        store.draft(lane).save_resume_point(0, note)


def split_evenly(lanes: Sequence[int], count: int) -> list[list[int]]:
    """Split ``lanes`` into ``count`` groups, or fewer if there are fewer lanes; group sizes differ by at most one."""
    count = min(count, len(lanes))
    size, larger = divmod(len(lanes), max(count, 1))
    starts = [number * size + min(number, larger) for number in range(count + 1)]
    return [list(lanes[start:end]) for start, end in zip(starts, starts[1:], strict=False)]


def _noted_group(store: ArtifactStore, lanes: Sequence[Stage], lane: int) -> list[int]:
    """Return the group that a lane was started in; empty if one of its lanes is no longer requested."""
    progress = store.resume_point(lanes[lane])
    keys = [] if progress is None else cast(list[str], progress.state.facts[GROUP])
    number_of = {stage.key: number for number, stage in enumerate(lanes)}
    return [number_of[key] for key in keys] if all(key in number_of for key in keys) else []


def _has_progress(store: ArtifactStore, lanes: Sequence[Stage]) -> bool:
    group = group_stage(lanes)
    return store.find(group) is not None or store.resume_point(group) is not None
