"""What a machine has of memory, read from made-up files, and how MLX is held to a part of it."""

import mlx.core as mx
import pytest

from qwen4b_asr import machine
from qwen4b_asr.machine import Machine, apple_working_set, hold, kept_buffers, this_machine

GIB = 1 << 30


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Write ``/proc`` and ``/sys/fs/cgroup`` as given; on a machine of 16 GiB with 9 free."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_sysconf", {"SC_PHYS_PAGES": 4 << 20, "SC_PAGE_SIZE": 4096}.get)
    monkeypatch.setattr(machine.sys, "platform", "linux")

    def write(**texts: str) -> None:
        for place, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:  {9 << 20} kB\n", **texts}.items():
            path = tmp_path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_without_control_groups_the_free_memory_counts(files):
    files()
    assert this_machine() == Machine(16 * GIB, 9 * GIB)


def test_a_control_group_counts_with_those_above_it_and_its_file_cache_is_free(files):
    files(
        **{
            "proc/self/cgroup": "0::/job/step\n",
            "cgroup/job/step/memory.max": "max\n",
            "cgroup/job/step/memory.current": "100\n",
            "cgroup/job/memory.max": f"{4 * GIB}\n",
            "cgroup/job/memory.current": f"{3 * GIB}\n",
            "cgroup/job/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        }
    )
    assert this_machine() == Machine(4 * GIB, 2 * GIB)


def test_control_groups_of_the_first_version_count_too(files):
    files(
        **{
            "proc/self/cgroup": "9:name=systemd:/\n4:memory:/box\n3:cpuset:/tiny\n",
            "cgroup/memory/box/memory.limit_in_bytes": f"{5 * GIB}\n",
            "cgroup/memory/box/memory.usage_in_bytes": f"{GIB}\n",
            "cgroup/memory/box/memory.stat": "inactive_file 0\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "cgroup/cpuset/tiny/memory.limit_in_bytes": "1\n",
            "cgroup/cpuset/tiny/memory.usage_in_bytes": "1\n",
        }
    )
    assert this_machine() == Machine(5 * GIB, 4 * GIB)


def test_a_full_control_group_has_nothing_left(files):
    files(
        **{"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "1000\n", "cgroup/memory.current": "2000\n"},
    )
    assert this_machine() == Machine(1000, 0)


def test_where_nothing_can_be_read_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    monkeypatch.setattr(machine, "_sysconf", lambda name: 0)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    assert this_machine() == Machine(None, None)


def test_a_mac_lends_its_gpu_two_thirds_or_three_quarters():
    # As Metal says on machines of 8, 16, 32 and 64 GB.
    mib = [apple_working_set(gib * GIB) >> 20 for gib in (8, 16, 32, 64)]
    assert mib == [5461, 10922, 21845, 49152]


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_a_gpu_tells_of_itself(monkeypatch, platform):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    told = {
        "darwin": {"memory_size": 16 * GIB, "max_recommended_working_set_size": 10 * GIB},
        "linux": {"total_memory": 80 * GIB, "free_memory": 70 * GIB},
    }
    monkeypatch.setattr(mx, "device_info", lambda: told[platform])
    assert this_machine() == {"darwin": Machine(16 * GIB, 10 * GIB), "linux": Machine(80 * GIB, 70 * GIB)}[platform]


def test_holding_sets_what_it_should(monkeypatch):
    calls = {}
    for name in ("set_memory_limit", "set_cache_limit", "set_wired_limit"):
        monkeypatch.setattr(mx, name, lambda size, name=name: calls.update({name: size}) or 0)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 10)
    hold(1000)
    assert calls == {}  # on a CPU MLX's own limits are as they should be
    hold(1000, 5000)
    assert calls == {"set_memory_limit": 5000}
    hold(1000, 500)  # too little would have it wait for ever
    assert calls == {"set_memory_limit": 1010}
    calls.clear()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"memory_size": 16 * GIB, "max_recommended_working_set_size": 900})
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    hold(1000)
    assert calls == {"set_cache_limit": machine.KEPT_ON_GPU, "set_wired_limit": 900}
    hold(500)
    assert calls["set_wired_limit"] == 510


def test_a_refused_wired_limit_stops_nothing(monkeypatch):
    asked = []

    def refuse(size: int) -> int:
        asked.append(size)
        raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum")

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", dict)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "set_cache_limit", lambda size: 0)
    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    hold(1000)
    assert len(asked) == 1


def test_what_mlx_keeps_is_read_without_changing_it():
    assert kept_buffers() == kept_buffers()
    before = mx.set_cache_limit(12345)
    assert kept_buffers() == 12345
    assert mx.set_cache_limit(before) == 12345
