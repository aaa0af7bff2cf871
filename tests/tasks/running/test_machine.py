"""Facts of the machine: limits of control groups of both versions, disks."""

import psutil
import pytest

from layerwise.tasks.running.machine import Disk, cpu_limits, disk, memory

GIB = 2**30


@pytest.fixture
def write(tmp_path):
    def write_files(files: dict[str, str]):
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
        return tmp_path

    return write_files


def test_the_limit_of_an_outer_control_group_counts(write):
    root = write(
        {
            "proc/self/cgroup": "0::/pod/container",
            "sys/fs/cgroup/pod/container/memory.max": "max",
            "sys/fs/cgroup/pod/container/memory.current": "1000",
            "sys/fs/cgroup/pod/container/cpu.max": "max 100000",
            "sys/fs/cgroup/pod/memory.max": str(GIB),
            "sys/fs/cgroup/pod/memory.current": str(GIB // 2),
            "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GIB // 4}\nactive_file 5",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000",
        }
    )
    found = memory(root)
    assert (found.total, found.is_limited) == (GIB, True)
    # A quarter is used by what cannot be dropped; the machine itself may have less left.
    assert found.available == min(GIB * 3 // 4, psutil.virtual_memory().available)
    assert list(cpu_limits(root)) == [1.5]


def test_the_first_version_of_control_groups_is_read_in_a_container_that_lacks_the_path_of_the_host(write):
    root = write(
        {
            "proc/self/cgroup": "4:memory:/docker/1234\n2:cpu,cpuacct:/docker/1234\n0::/docker/1234",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        }
    )
    found = memory(root)
    assert (found.total, found.available) == (GIB, 0)
    assert list(cpu_limits(root)) == [2]


def test_without_a_limit_the_memory_is_that_of_the_machine(write):
    root = write(
        {
            "proc/self/cgroup": "4:memory:/\n2:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        }
    )
    assert (memory(root).total, memory(root).is_limited) == (psutil.virtual_memory().total, False)
    assert list(cpu_limits(root)) == []


def test_the_disk_of_a_missing_folder_is_that_of_its_parent(tmp_path):
    found = disk(tmp_path / "missing" / "folder")
    assert found.folder == str(tmp_path / "missing" / "folder")
    assert found.free > 0
    assert found.is_writable
    assert found.kind == disk(tmp_path).kind != "unknown"


@pytest.mark.parametrize(
    ("kind", "remote"), [("nfs4", True), ("fuse.sshfs", True), ("ext4", False), ("tmpfs", False)]
)
def test_network_disks_are_known_by_their_type(kind, remote):
    assert Disk("/home", 1, kind, True).is_remote == remote
