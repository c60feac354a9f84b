"""How much memory there is, for machines that tell how much they have and for those that do not."""

import os
import resource

import jax
import pytest
from pkjax.linalg import memory
from pkjax.linalg.memory import budget, default_memory_limit, host_memory

PAGES = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine of 4,096,000 bytes without control groups."""
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    monkeypatch.setattr(os, "sysconf", PAGES.__getitem__)
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.delenv("PKJAX_WORKERS", raising=False)
    return tmp_path


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_an_accelerator_offers_half_of_its_own_memory_however_many_there_are(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_limit": 80 * 10**9})])
    assert default_memory_limit() == default_memory_limit(8) == 40 * 10**9


def test_devices_of_one_cpu_share_half_of_the_machines_memory():
    assert default_memory_limit() == 2048 * 1000
    assert default_memory_limit(4) == 512 * 1000


@pytest.mark.parametrize("error", [ValueError, OSError, AttributeError])
def test_a_system_that_does_not_tell_is_taken_to_have_four_gibibytes(monkeypatch, error):
    def fails(name):
        raise error

    monkeypatch.setattr(jax, "local_devices", lambda: [Device({})])
    monkeypatch.setattr(os, "sysconf", fails)
    assert default_memory_limit() == 2**31


UNLIMITED = "9223372036854771712\n"
V1 = "4:cpu,memory:/jobs/mine\n3:cpuset:/elsewhere\n0::/\n"
V1_MOUNT = "35 31 0:32 {top} {at} rw,relatime shared:9 - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 {top} {at} rw,relatime - cgroup2 cgroup2 rw\n"


@pytest.mark.parametrize(("files", "limit"), [
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "1000000\n",
      "sys/fs/cgroup/a/memory.max": "max\n"}, 10**6),
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "3000000\n",
      "sys/fs/cgroup/a/memory.max": "900000\n"}, 900_000),                        # the outer group is the narrower
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n",
      "sys/fs/cgroup/a/memory.high": "800000\n"}, 800_000),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "700000\n"}, 700_000),      # a container's own root
    ({"proc/self/cgroup": "0::/../../other\n", "sys/fs/cgroup/memory.max": "700000\n"}, 700_000),
    ({"proc/self/cgroup": "0::/docker/9f\n", "sys/fs/cgroup/memory.max": "600000\n"}, 600_000),   # the host's path
    ({"proc/self/cgroup": "0::/pod/x\n", "proc/self/mountinfo": V2_MOUNT.format(top="/pod", at="/my\\040groups"),
      "my groups/x/memory.max": "500000"}, 500_000),
    ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/jobs/mine/memory.limit_in_bytes": UNLIMITED,
      "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": "400000\n",
      "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED}, 400_000),
    ({"proc/self/cgroup": V1, "proc/self/mountinfo": V1_MOUNT.format(top="/jobs/mine", at="/cg/memory"),
      "cg/memory/memory.limit_in_bytes": "300000\n"}, 300_000),
    ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpuset/elsewhere/memory.limit_in_bytes": "1000\n"}, None),
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "garbage\n"}, None),
    ({"proc/self/cgroup": "garbage\n\n:::\n", "proc/self/mountinfo": "- -\n x - cgroup2\n"}, None),
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max/file": "not a file"}, None),
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "0\n"}, None),
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "99000000000\n"}, None)])
def test_control_groups_limit_the_memory_of_those_within(machine, files, limit):
    write(machine, files)
    assert host_memory() == host_memory(machine) == (4_096_000 if limit is None else limit)


def test_limits_of_the_process_count(monkeypatch):
    limits = {resource.RLIMIT_AS: 2_000_000, resource.RLIMIT_DATA: 1_000_000}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY), 0))
    assert host_memory() == 1_000_000
    del limits[resource.RLIMIT_DATA]
    assert host_memory() == 2_000_000


def test_workers_of_a_sweep_share(monkeypatch):
    monkeypatch.setenv("PKJAX_WORKERS", "4")
    assert default_memory_limit() == 512 * 1000
    assert default_memory_limit(2) == 256 * 1000
    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_limit": 8000})])
    assert default_memory_limit() == 1000
    for value in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv("PKJAX_WORKERS", value)
        with pytest.raises(ValueError, match=f"PKJAX_WORKERS must be a whole number of at least 1, got '{value}'"):
            default_memory_limit()


def test_intermediate_arrays_take_a_sixteenth_of_the_limit_at_most():
    assert budget(1000) == 1000
    assert budget(2**26) == 2_048_000 // 16 // 4
    assert budget(2**26, itemsize=8) == 2_048_000 // 16 // 8
