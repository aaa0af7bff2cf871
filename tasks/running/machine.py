"""Facts of this machine: CPU, memory, disks and GPUs, within the limits of its container."""

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from layerwise.sparse.timing import cpu_name

# Flags of /proc/cpuinfo for the instructions that matrix products and the sparse kernel use.
INSTRUCTIONS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "avx512_bf16", "amx_bf16": "AMX"}
NETWORK_DISKS = re.compile(r"nfs\d?|cifs|smb\w*|lustre|gpfs|beegfs|ceph|9p|afs|fuse\.(sshfs|glusterfs|s3fs)")
NVIDIA = "0x10de"  # vendor of a PCI device
DISPLAY = ("0x0300", "0x0302")  # classes of PCI devices: graphics card, and GPU without a display


@dataclass(frozen=True)
class Cpu:
    """The CPU, and the part of it that this process may use.

    Attributes:
        instructions: those of ``INSTRUCTIONS`` that it has.
        cores: number of logical cores of the machine.
        usable: number of cores that the affinity and the control group allow.
        threads: number of threads that torch computes with.
    """

    name: str
    instructions: tuple[str, ...]
    cores: int
    usable: float
    threads: int


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes; that of the control group if it has a limit.

    Attributes:
        is_limited: whether a control group allows less than the machine has.
    """

    total: int
    available: int
    is_limited: bool


@dataclass(frozen=True)
class Disk:
    """Disk of a folder.

    Attributes:
        folder: may not exist yet.
        free: bytes.
        kind: type of the file system, such as ext4.
        is_writable: whether this user may create files in the folder, or create the folder.
    """

    folder: str
    free: int
    kind: str
    is_writable: bool

    @property
    def is_remote(self) -> bool:
        """Whether the disk belongs to another machine."""
        return NETWORK_DISKS.fullmatch(self.kind) is not None


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use; memory in bytes."""

    name: str
    capability: tuple[int, int]
    free: int
    total: int


@dataclass(frozen=True)
class Gpus:
    """GPUs, and torch's access to them.

    Attributes:
        build: kind of torch's build: "CPU", or such as "CUDA 12.8" or "ROCm 6.4".
        usable: GPUs that torch can use.
        driver: version of NVIDIA's driver; None if it is not loaded.
        are_present: whether the machine has an NVIDIA GPU, or the files of one.
        visible: value of CUDA_VISIBLE_DEVICES; None if it is not set.
        reason: torch's reason for not using the GPUs; "" if it gives none.
    """

    build: str
    usable: tuple[Gpu, ...] = ()
    driver: str | None = None
    are_present: bool = False
    visible: str | None = None
    reason: str = ""


def cpu() -> Cpu:
    """Describe the CPU."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*: (.+)", text, re.MULTILINE)
    flags = found[1].split() if found else []
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return Cpu(
        cpu_name(),
        tuple(name for flag, name in INSTRUCTIONS.items() if flag in flags),
        cores,
        min([allowed, *cpu_limits()]),
        torch.get_num_threads(),
    )


def memory(root: Path = Path("/")) -> Memory:
    """Describe the main memory. Pages of files that the system can drop count as available.

    Args:
        root: folder with ``proc`` and ``sys``.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, used in memory_limits(root):
        if limit < machine.total:  # the first version of control groups has a huge limit for none
            total, available = min(total, limit), min(available, max(limit - used, 0))
    return Memory(total, available, total < machine.total)


def memory_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield the limit of every control group that has one, and the memory that it uses, in bytes.

    Args:
        root: folder with ``proc`` and ``sys``.
    """
    files = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for folder in _control_groups("memory", root):
        for limit_file, used_file, droppable in files:
            limit, used = _read(folder / limit_file), _read(folder / used_file)
            if limit.isdecimal() and used.isdecimal():
                cached = re.search(rf"^{droppable} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                yield int(limit), int(used) - (int(cached[1]) if cached else 0)


def cpu_limits(root: Path = Path("/")) -> Iterator[float]:
    """Yield the number of cores that each control group with a quota allows.

    Args:
        root: folder with ``proc`` and ``sys``.
    """
    for folder in _control_groups("cpu", root):
        split = _read(folder / "cpu.max").split()  # "max 100000" without a quota
        split = split or [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if all(number.isdecimal() for number in split):  # -1 without a quota
            quota, period = map(int, split)
            yield quota / period


def disk(folder: Path | str) -> Disk:
    """Describe the disk on which ``folder`` is, or would be created."""
    path = Path(folder).expanduser().absolute()
    existing = next(each for each in (path, *path.parents) if os.path.isdir(each))
    real = existing.resolve()
    # The last mount on a folder hides the earlier ones.
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    kind = next((mounts[str(each)] for each in (real, *real.parents) if str(each) in mounts), "unknown")
    room = os.statvfs(existing)
    writable = os.access(existing, os.W_OK | os.X_OK)
    return Disk(str(path), room.f_bavail * room.f_frsize, kind, writable)


def gpus() -> Gpus:
    """Describe the GPUs. Starts CUDA in this process if there are any."""
    build = "CPU"
    if torch.version.cuda or torch.version.hip:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    usable: list[Gpu] = []
    with warnings.catch_warnings(record=True) as said:  # torch warns with its reason, and returns False
        warnings.simplefilter("always")
        try:
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
                free, total = torch.cuda.mem_get_info(index)
                name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
                usable.append(Gpu(name, capability, free, total))
            reason = str(said[-1].message) if said and not usable else ""
        except RuntimeError as error:
            usable, reason = [], str(error)
    version = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _read(Path("/proc/driver/nvidia/version")))
    devices = Path("/sys/bus/pci/devices")
    on_bus = any(
        _read(each / "vendor") == NVIDIA and _read(each / "class")[:6] in DISPLAY
        for each in (devices.iterdir() if devices.is_dir() else ())
    )
    return Gpus(
        build,
        tuple(usable),
        version[1] if version else None,
        bool(version) or on_bus or Path("/dev/nvidia0").exists(),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        reason,
    )


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, of both versions, each followed by its parents.

    In a container the path may be that of the host, whose folders are missing; the root folder is that of the container.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = top / path.lstrip("/")
        yield folder
        while folder != top:
            folder = folder.parent
            yield folder


def _read(file: Path) -> str:
    """Return the content of a small file, without white space around it; "" if it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
