"""Diagnosis: facts of a set-up in, lines and problems out."""

from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.flows.cli.diagnosis import (
    Hub,
    Kernel,
    Setup,
    Store,
    lines_of,
    lines_of_model,
    problems_of,
    problems_of_model,
)
from layerwise.flows.orchestration.chosen_server import ChosenServer
from layerwise.flows.plan import Plan, PlannedStage
from layerwise.storage.files.storage_rates import StorageRates
from layerwise.tasks.running.machine import Cpu, Disk, Gpu, Gpus, Memory

H200 = Gpu("NVIDIA H200", (9, 0), 130 * 2**30, 139 * 2**30)
HOME = Disk("/home/user/.cache/layerwise/prefect-3.8.8", 10**11, "ext4", True)
HEALTHY = Setup(
    versions={"Python": "3.12", "layerwise": "0.1.0", "torch": "2.9.1"},
    cpu=Cpu("AMD EPYC", ("AVX2", "AVX-512"), 16, 8, 8),
    device="cpu",
    slower=0.5,
    omp_threads=None,
    memory=Memory(32 * 2**30, 20 * 2**30, False),
    gpus=Gpus("CPU"),
    kernel=Kernel("avx512"),
    scratch=Disk("/tmp", 10**11, "ext4", True),
    server=ChosenServer(home=Path(HOME.folder), home_is_ours=True),
    home=HOME,
    hub=Hub("/home/user/.cache/huggingface", False, True),
)
LOCAL = Store("/data/store", disk=Disk("/data/store", 10**9, "xfs", True), rates=StorageRates(1e8, 1e9))
PLAN = Plan(
    stages=(
        PlannedStage("import_checkpoint", "in the store"),
        PlannedStage("capture", "run", writes=10**8, seconds=600),
        PlannedStage("branch: 7 betas", "prune and score 7 of them", seconds=3600),
        PlannedStage("export", "run", writes=10**10, seconds=60),
        PlannedStage("evaluate", "run", seconds=120),
    ),
    layer_bytes=(400_000_000,) * 32,
    weights=13 * 10**9,
    betas=(0.0,),
    device="cuda",
    memory={"hidden states": 4 * 2**30},
    device_memory={"layer in use": 10**9, "logits of one window": 10**8},
    scratch=0,
    resume_point=0,
    resume_bytes_an_hour=0.0,
    resume_bytes_a_stage=0,
    groups=(),
    fan_out=None,
    resume_point_seconds=None,
    measuring=5.0,
    notes=(),
)


def value_of(name: str, setup: Setup) -> str:
    return dict(lines_of(setup))[name]


def test_a_healthy_setup_has_no_problems():
    assert list(problems_of(HEALTHY)) == []
    assert value_of("GPUs", HEALTHY) == "none"


@pytest.mark.parametrize(
    ("changes", "stops", "words"),
    [
        (
            {"gpus": Gpus("CUDA 12.8", are_present=True, reason="Found no NVIDIA driver")},
            True,
            ["no driver that torch for CUDA 12.8 can use (Found no NVIDIA driver)", "docker run --gpus all"],
        ),
        (
            {"gpus": Gpus("CUDA 13.0", driver="470.82", are_present=True, reason="driver is too old")},
            True,
            ["torch for CUDA 13.0 cannot use the GPU with driver 470.82 (driver is too old)", "Update"],
        ),
        # PyPI's torch for Linux is built for CUDA, also on machines without a GPU, where it works.
        ({"gpus": Gpus("CUDA 12.8")}, False, ["built for CUDA 12.8, but no GPU or driver was found"]),
        ({"gpus": Gpus("CPU", driver="570.1", are_present=True)}, False, ["built for the CPU"]),
        (
            {"gpus": Gpus("CUDA 12.8", driver="570.1", are_present=True, visible="")},
            False,
            ["CUDA_VISIBLE_DEVICES is '', which hides all GPUs"],
        ),
        (
            {"gpus": Gpus("CUDA 12.8", (H200,)), "device": "cuda", "slower": None, "refusal": "no image"},
            True,
            ["torch 2.9.1 cannot compute on cuda (no image)", "--device cpu"],
        ),
        ({"home": replace(HOME, kind="nfs4")}, False, ["network disk (nfs4)", "set XDG_CACHE_HOME"]),
        (
            {"home": replace(HOME, kind="nfs4"), "server": ChosenServer(home=Path("/nfs"))},
            False,
            ["set PREFECT_HOME"],
        ),
        ({"home": replace(HOME, free=10**6)}, True, ["only 1.0 MB left"]),
        (
            {"kernel": Kernel(None, "kernel.so does not exist", "Build it.")},
            False,
            ["does not exist): ranking"],
        ),
        ({"slower": 11.0}, False, ["bfloat16 is 11 times slower", "--dtype float32"]),
        ({"cpu": replace(HEALTHY.cpu, usable=1.5)}, False, ["8 threads on 1.5 usable cores", "THREADS=1."]),
        (
            {"cpu": replace(HEALTHY.cpu, threads=2), "omp_threads": "2"},
            False,
            ["2 of 8 usable cores, because OMP_NUM_THREADS is 2"],
        ),
        ({"store": Store("s3://bucket", problem="no answer")}, True, ["store cannot be used: no answer"]),
        ({"server": ChosenServer("http://host/api", problem="no answer"), "home": None}, True, ["no answer"]),
    ],
)
def test_a_problem_says_what_is_wrong_and_whether_it_stops_a_search(changes, stops, words):
    (problem,) = problems_of(replace(HEALTHY, **changes))
    assert problem.stops == stops
    for each in words:
        assert each in problem.text


def test_equal_gpus_share_a_line():
    several = Gpus("CUDA 12.8", (H200, replace(H200, free=2**30)), driver="570.86.15", are_present=True)
    setup = replace(HEALTHY, gpus=several, device="cuda")
    assert value_of("GPUs", setup) == (
        "2 x NVIDIA H200 (capability 9.0, 139.0 GiB), 1.0 GiB free; driver 570.86.15"
    )
    assert list(problems_of(setup)) == []


def test_a_model_has_its_sizes_and_its_times_by_stage():
    setup = replace(HEALTHY, gpus=Gpus("CUDA 12.8", (H200,)), device="cuda")
    lines = dict(lines_of_model(PLAN, LOCAL))
    assert lines["model"] == "32 decoder layers, 13 GB; the largest layer 400 MB"
    assert lines["search needs"] == "memory 4.29 GB, memory of cuda 1.1 GB, space in the store 10.1 GB"
    assert lines["takes"] == (
        "about 73 min (cuda): import done, capture 10 min, lanes 60 min, export and test 3 min"
    )
    assert list(problems_of_model(PLAN, setup)) == []


def test_the_upload_to_a_remote_store_takes_time():
    remote = Store("s3://bucket", "https://host", rates=StorageRates(10e6, 1e9))
    assert dict(lines_of_model(PLAN, remote))["upload"].startswith("17 min more")


def test_a_model_that_does_not_fit_is_a_problem():
    gpu = replace(H200, free=10**8, total=10**9)
    setup = replace(
        HEALTHY,
        gpus=Gpus("CUDA 12.8", (gpu,)),
        memory=Memory(32 * 2**30, 2**30, False),
        store=LOCAL,
    )
    memory, device, disk = problems_of_model(PLAN, setup)
    assert not memory.stops  # other processes may end
    assert "needs 4.29 GB of memory (the largest part: hidden states), but 1.07 GB of 34.4 GB" in memory.text
    assert device.stops
    assert "needs 1.1 GB of memory of cuda (the largest part: layer in use)" in device.text
    assert disk.stops
    assert "writes 10.1 GB into /data/store, where 1 GB are free" in disk.text
