"""The command ``doctor``: collect the facts of this set-up, and print them and the problems on one screen."""

import os
import platform
import tempfile
import uuid
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import constants, get_token

from layerwise.flows.cli.console import open_console, waiting
from layerwise.flows.cli.diagnosis import (
    Hub,
    Kernel,
    Line,
    Problem,
    Setup,
    Store,
    lines_of,
    lines_of_model,
    problems_of,
    problems_of_model,
)
from layerwise.flows.cli.errors import explain
from layerwise.flows.orchestration.chosen_server import choose_server
from layerwise.sparse.build import NoKernel, compiler
from layerwise.sparse.native import LEVELS, LIBRARY, load
from layerwise.storage.files.credentials import holds_credentials, without_credentials
from layerwise.storage.files.errors import endpoint_of
from layerwise.storage.files.s3_upload import is_s3
from layerwise.storage.files.storage_rates import measure_storage
from layerwise.storage.location import StoreLocation
from layerwise.tasks.models.dtype_speed import times_slower_than_float32
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.machine import cpu, disk, gpus, memory
from layerwise.tasks.running.printable import one_line

SPARSITY = 0.5  # of the search whose needs are shown for a model; they hardly depend on it
PACKAGES = {"layerwise": "layerwise-pruning", **{name: name for name in ("torch", "transformers", "prefect")}}
NAMES = 15  # columns for the names of the lines
# A search waits for an S3 server for minutes. Here the answer is wanted soon.
S3_QUICKLY = {
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "connect_timeout": 5,
    "read_timeout": 20,
}
S3_RETRIES = 2


def examine(store_url: str | None, model: str | None, debug: bool) -> int:
    """Print what this machine and its set-up have, what a search of ``model`` needs, and what is wrong.

    Args:
        store_url: store to measure; None for none.
        debug: print the tracebacks of errors on stderr.

    Returns:
        The exit code: 1 if a problem stops a search.
    """
    with waiting("measuring this machine" if store_url is None else "measuring this machine and the store"):
        setup = collect(store_url, debug)
    lines, problems = list(lines_of(setup)), list(problems_of(setup))
    if model is not None:
        with waiting(f"planning a search of {model}"):
            more_lines, more_problems = examine_model(model, setup, store_url, debug)
        lines, problems = [*lines, *more_lines], [*problems, *more_problems]
    console = open_console()
    for name, value in lines:
        console.print(f"{name:{NAMES}}{one_line(value)}", soft_wrap=True)
    console.print("Problems" if problems else "No problems found.")
    for problem in sorted(problems, key=lambda problem: not problem.stops):
        kind = "error" if problem.stops else "warning"
        console.print(f"  {kind}: {one_line(problem.text)}", soft_wrap=True)
    return 1 if any(problem.stops for problem in problems) else 0


def collect(store_url: str | None, debug: bool = False) -> Setup:
    """Collect the facts of this set-up. Leaves nothing behind."""
    found, server = gpus(), choose_server()
    device, slower, refusal = "cuda" if found.usable else "cpu", None, ""
    try:
        slower = times_slower_than_float32("bfloat16", Execution(device))
    except RuntimeError as error:  # such as a GPU that this build of torch has no code for
        refusal = str(error).partition("\n")[0]
    return Setup(
        versions={
            "Python": platform.python_version(),
            **{name: version(of) for name, of in PACKAGES.items()},
        },
        cpu=cpu(),
        device=device,
        slower=slower,
        refusal=refusal,
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
        memory=memory(),
        gpus=found,
        kernel=find_kernel(),
        scratch=disk(tempfile.gettempdir()),
        server=server,
        home=None if server.home is None else disk(server.home),
        hub=Hub(constants.HF_HOME, constants.HF_HUB_OFFLINE, get_token() is not None),
        store=None if store_url is None else measure_store(store_url, debug),
    )


def find_kernel(library: Path = LIBRARY) -> Kernel:
    """Load the sparse kernel from its file, without the warning that ``native.kernel`` logs."""
    try:
        return Kernel(LEVELS[load(library).layerwise_level()])
    except OSError as error:
        advice = "Build it with `python -m layerwise.sparse.build`."
        try:
            compiler()
        except NoKernel as no_compiler:
            advice = f"{no_compiler}, then build it with `python -m layerwise.sparse.build`."
        return Kernel(None, str(error), advice)


def measure_store(url: str, debug: bool = False) -> Store:
    """Measure a store with a temporary file."""
    place = without_credentials(url)
    if holds_credentials(url):
        problem = (
            "its URL holds credentials, which a search refuses: put them into environment variables or the fsspec "
            "configuration."
        )
        return Store(place, problem=problem)
    server, where = "", None
    try:
        location = StoreLocation(url)
        if is_s3(location.fs):
            location = StoreLocation(url, config_kwargs={**location.fs.config_kwargs, **S3_QUICKLY})
            location.fs.retries = S3_RETRIES
        if location.is_local:
            where = disk(location.root)
        else:
            server = endpoint_of(location.fs)
        return Store(place, server, where, measure_storage(location.fs, location.root))
    except Exception as error:
        return Store(place, server, where, problem=explain(error, debug))


def examine_model(
    model: str, setup: Setup, store_url: str | None, debug: bool = False
) -> tuple[Sequence[Line], Sequence[Problem]]:
    """Plan a search of a model with the default settings, in the store or, if it cannot be used, in an empty one."""
    if setup.server.url is None and setup.server.home is None:  # the flows import Prefect
        return [], [Problem("the model was not examined, because Prefect cannot be used.")]
    store = setup.store if setup.store is not None and not setup.store.problem else None
    empty = f"{tempfile.gettempdir()}/layerwise-doctor-{uuid.uuid4().hex}"  # never created
    try:
        from layerwise.flows.options import read_options
        from layerwise.flows.plan import plan_search
        from layerwise.flows.runtime import SearchRuntime
        from layerwise.flows.settings import Search

        settings = read_options(Namespace(model=model), Search, sparsity=SPARSITY)
        runtime = read_options(Namespace(store=empty if store is None else store_url), SearchRuntime)
        plan = plan_search(settings, runtime, measure=True)
    except Exception as error:
        return [], [Problem(f"the model cannot be searched: {explain(error, debug)}", stops=True)]
    return list(lines_of_model(plan, store)), list(problems_of_model(plan, setup))
