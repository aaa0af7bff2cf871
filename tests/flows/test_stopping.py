"""SIGTERM to a search in another process: the printed command resumes the search."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter

from layerwise.flows.runtime import Runtime
from layerwise.flows.search import search
from layerwise.storage.store import ArtifactStore

# A search that gets the signal while it reads the second layer in its second pass, which is that of the lanes.
STOPPED_IN_THE_LANES = """
import os, signal, sys
from layerwise.tasks.models.checkpoint import Checkpoint

read, passes = Checkpoint.layers, []

def layers(checkpoint, first=0, *device):
    passes.append(first)
    for index, layer in enumerate(read(checkpoint, first, *device), first):
        if len(passes) == 2 and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield layer

Checkpoint.layers = layers
from layerwise.flows.cli.main import main
main()
"""


@pytest.fixture
def start(prefect_backend, pytestconfig, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess:
        home = tmp_path / f"home-{len(list(tmp_path.iterdir()))}"  # another machine each time
        environment = os.environ | {"PREFECT_API_URL": prefect_backend, "PREFECT_HOME": str(home)}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=pytestconfig.rootpath,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_a_terminated_search_prints_a_command_that_resumes_it(start, finished, workshop, tmp_path):
    store = str(tmp_path / "store")
    parameters = workshop.parameters(betas="0.1,0.25")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]
    stopped = start("-c", STOPPED_IN_THE_LANES, "search", *options, "--store", store)
    assert stopped.returncode == 143
    assert stopped.stdout == ""
    said, command = stopped.stderr.splitlines()[-2:]
    assert said.startswith("layerwise: stopped by SIGTERM")
    assert said.endswith("Resume with:")

    name, *arguments = shlex.split(command)
    assert name == "layerwise"
    resumed = start("-m", "layerwise", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(
        r"^\S+Z branch: 3 betas.* resumed from layer 2 of 3, saved ", resumed.stderr, re.MULTILINE
    )
    assert finished[0].selection.verdict in resumed.stdout
    found = search(workshop.settings(), Runtime(store=store))
    assert found.built == ()
    assert {role: artifact.content for role, artifact in found.stages.items()} == {
        role: artifact.content for role, artifact in finished[0].stages.items()
    }
    assert ArtifactStore(store).fs.find(f"{store}/running") == []
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name={"any_": ["search"]}),
            flow_run_filter=FlowRunFilter(state={"type": {"any_": ["CRASHED"]}}),
        )
    assert store in [run.parameters["runtime"]["store"] for run in runs]


# The allocator of torch refuses a size that no machine has.
OUT_OF_MEMORY = """
import torch
from layerwise.models.hidden_states import HiddenStatesRoom

HiddenStatesRoom.empty = lambda room, shape, dtype: torch.empty(1 << 60, dtype=dtype)
from layerwise.flows.cli.main import main
main()
"""


def test_an_error_for_lack_of_memory_says_what_to_do(start, workshop, tmp_path):
    options = [f"--{name.replace('_', '-')}={v}" for name, v in workshop.parameters(betas="0.1").items()]
    done = start("-c", OUT_OF_MEMORY, "search", *options, "--store", str(tmp_path / "store"))
    assert (done.returncode, done.stdout) == (1, "")
    said, command = done.stderr.splitlines()[-2:]
    assert re.match(
        r"layerwise: not enough memory \(.*can't allocate memory.*\)\. `layerwise plan` shows", said
    )
    assert command.startswith("  layerwise search --model=")
