"""In which groups the betas of a search are spread over processes."""

import math
from collections.abc import Sequence

from layerwise.flows.pipeline.memory_estimate import SearchSizes
from layerwise.flows.runtime import Runtime
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import begun_groups, split_evenly


def lane_groups(
    store: ArtifactStore,
    lanes: Sequence[Stage],
    missing: Sequence[int],
    sizes: SearchSizes,
    runtime: Runtime,
    workers: int,
) -> list[list[int]]:
    """The groups that are to run, as numbers of their lanes: begun ones as they are, then what is left, spread anew.

    Args:
        lanes: stages of all lanes; empty if they cannot be known yet.
        missing: numbers of the lanes that the store does not have.
        sizes: tells how many lanes' hidden states fit into the memory that ``runtime`` gives them.
        workers: how many groups run at a time.
    """
    begun = list(begun_groups(store, lanes, missing)) if lanes else []
    left = [lane for lane in missing if not any(lane in group for group in begun)]
    if runtime.fan_out == "local":
        return [*begun, *split_evenly(left, 1)]
    count = runtime.groups or group_count(len(left), workers, _lanes_in_memory(sizes, runtime))
    return [*begun, *split_evenly(left, count)]


def group_count(lanes: int, workers: int, lanes_in_memory: int) -> int:
    """As few groups as keep all workers busy and every group's hidden states in memory, for each reads the model once.

    A whole number for each worker, so that none waits for the last one while it could have taken a share.
    """
    count = math.ceil(lanes / lanes_in_memory)
    return min(lanes, workers * math.ceil(count / workers))


def _lanes_in_memory(sizes: SearchSizes, runtime: Runtime) -> int:
    """Beside the dense model's; one at least, whose hidden states go to files then."""
    return max(runtime.hidden_states_bytes // max(sizes.lane, 1) - 1, 1)
