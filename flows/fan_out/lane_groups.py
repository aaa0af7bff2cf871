"""Lane groups of a search that is spread over processes."""

import math

from layerwise.flows.pipeline.lookup import NextLanes
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.runtime import FanOutRuntime
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.group_membership import begun_groups, split_evenly


def lane_groups(
    store: ArtifactStore, lanes: NextLanes, sizes: SearchSizes, runtime: FanOutRuntime, workers: int
) -> list[list[int]]:
    """Return the groups to run, as positions of their lanes in the request.

    Groups that an earlier run started are kept as they were. The other missing lanes are divided into new groups.

    Args:
        sizes: sizes of the lanes. They decide how many lanes fit into the memory of one process.
        workers: number of groups that run at a time.
    """
    started = list(begun_groups(store, lanes.stages, lanes.missing)) if lanes.are_known else []
    left = [lane for lane in lanes.missing if not any(lane in group for group in started)]
    if runtime.fan_out == "local":
        return [*started, *split_evenly(left, 1)]
    count = runtime.groups or group_count(len(left), workers, _lanes_in_memory(sizes, runtime))
    return [*started, *split_evenly(left, count)]


def group_count(lanes: int, workers: int, lanes_in_memory: int) -> int:
    """Return the number of groups: as few as possible, since each group reads the whole model.

    The hidden states of a group fit into memory. The number is a multiple of the number of workers, so that no worker
    is idle while another one runs the last group.
    """
    count = math.ceil(lanes / lanes_in_memory)
    return min(lanes, workers * math.ceil(count / workers))


def _lanes_in_memory(sizes: SearchSizes, runtime: FanOutRuntime) -> int:
    """Return how many lanes fit into memory; 1 if none does, as its states then go to files."""
    left = runtime.hidden_states_bytes - sizes.beside_lanes
    return max(left // max(sizes.lane, 1), 1)
