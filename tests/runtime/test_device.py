"""Where the process runs: the device, the dtype and the threads that are picked."""

import os
import subprocess
import sys

import pytest
import torch

from minillm.errors import UnavailableError, UsageError
from minillm.runtime import device, launch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("fast, slow", [(1, 4), (4, 1)])
def test_auto_takes_the_faster_number_of_threads(monkeypatch, fast, slow):
    monkeypatch.setattr(device, "available_threads", lambda: 4)
    seconds = {fast: 0.001, slow: 0.002}
    monkeypatch.setattr(device, "_product_seconds", lambda: seconds[torch.get_num_threads()])
    threads, why = device.set_threads("auto")
    assert threads == torch.get_num_threads() == fast
    assert why.startswith("timed a matrix product") and "1: " in why and "4: " in why


def test_threads_as_asked(monkeypatch):
    monkeypatch.setattr(device, "_product_seconds", lambda: pytest.fail("nothing to time"))
    assert device.set_threads(2) == (2, "as asked")
    assert device.set_threads("1") == (1, "as asked") and torch.get_num_threads() == 1
    monkeypatch.setattr(device, "available_threads", lambda: 1)
    assert device.set_threads("auto") == (1, "one processor")


def test_a_stall_now_and_then_counts(monkeypatch):
    """Half of the products stall: the median may not see it, the upper quartile does."""
    now = [0.0]
    calls = [0]

    def clock():
        calls[0] += 1
        now[0] += 0.1 if calls[0] % 4 == 3 else 0.001
        return now[0]

    monkeypatch.setattr(device.time, "perf_counter", clock)
    assert device._product_seconds() > 0.05


def test_devices(monkeypatch):
    assert device.pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device("auto") == CUDA
    assert device.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UnavailableError, match="device cuda:2: 2 CUDA devices here"):
        device.pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick_device("auto") == torch.device("mps") == device.pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.pick_device("auto") == CPU
    for name in ("cuda", "mps", "meta"):
        with pytest.raises(UnavailableError, match="use device cpu"):
            device.pick_device(name)
    for name in ("", "gpu", "cuda:-1", "cuda:x"):
        with pytest.raises(UsageError, match="is not one of auto, cpu, cuda"):
            device.pick_device(name)


def test_dtypes(monkeypatch):
    for has, width, expected in [
        (True, 64, torch.bfloat16),
        (True, 63, torch.float32),
        (False, 4096, torch.float32),
    ]:
        monkeypatch.setattr(device, "cpu_has_bf16", lambda has=has: has)
        assert device.pick_dtype("auto", CPU, width) == expected
    assert device.pick_dtype("bf16", CPU, 8) == torch.bfloat16
    assert device.pick_dtype("fp32", CPU, 4096) == torch.float32
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        # What PyTorch emulates on older GPUs counts as supported unless it is asked not to.
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True, native=native: native
                            or including_emulation)  # fmt: skip
        assert device.pick_dtype("auto", CUDA, 8) == expected


def test_what_a_launcher_says(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launch.launched() == launch.World()
    said = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1",
            "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2",
            "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "job",
            "MASTER_ADDR": "here", "MASTER_PORT": "1234",
            "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert launch.launched() == launch.World(3, 4, 1, 2, 1, 2, 2, None, "here", 1234, True)
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(UsageError, match="RANK is 'three'; expected a whole number"):
        launch.launched()
    monkeypatch.delenv("RANK")
    with pytest.raises(UsageError, match="WORLD_SIZE is 4, but RANK or MASTER_ADDR is not set"):
        launch.launched()


def test_each_rank_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device("auto", 1) == torch.device("cuda:1")
    assert device.pick_device("cpu", 1) == CPU
    with pytest.raises(UnavailableError, match="cuda:2: 2 CUDA devices here"):
        device.pick_device("cuda", 2)


MIB = 1 << 20


@pytest.fixture
def system(monkeypatch) -> dict[str, str]:
    """The files of the system, by path: those put here, and no others."""
    files: dict[str, str] = {}
    monkeypatch.setattr(device, "_read", lambda path: files.get(path, ""))
    return files


@pytest.mark.parametrize(
    "available, limit, used, expected",
    [
        (2048, "", "", 2048),
        (2048, "max\n", f"{900 * MIB}\n", 2048),  # a container without a limit
        (2048, f"{1000 * MIB}\n", f"{900 * MIB}\n", 100),
        (50, f"{1000 * MIB}\n", f"{900 * MIB}\n", 50),
        (2048, f"{1000 * MIB}\n", f"{1001 * MIB}\n", 0),
        (2048, f"{1000 * MIB}\n", "", 2048),
        (2048, "rubbish", "1", 2048),
        (0, "", "", 0),
        (None, "", "", None),
    ],
)
def test_the_memory_that_is_free(system, available, limit, used, expected):
    """MemAvailable, not MemFree: what the page cache holds can be had. MiB in and out."""
    if available is not None:
        system["/proc/meminfo"] = (
            "MemTotal:       99999999 kB\nMemFree:            1024 kB\n"
            f"MemAvailable:   {available * 1024:8d} kB\nBuffers:             512 kB\n"
        )
    system["/sys/fs/cgroup/memory.max"] = limit
    system["/sys/fs/cgroup/memory.current"] = used
    free = device.available_memory(CPU)
    assert free == (None if expected is None else expected * MIB)


@pytest.mark.parametrize("text", ["", "MemFree: 12 kB\n", "MemAvailable: lots\n"])
def test_a_system_that_does_not_say_what_is_free(system, text):
    system["/proc/meminfo"] = text
    assert device.available_memory(CPU) is None


@pytest.mark.parametrize(
    "quota, expected",
    [("", 8), ("max 100000\n", 8), ("200000 100000\n", 2), ("150000 100000\n", 2),
     ("50000 100000\n", 1), ("1600000 100000\n", 8)],
)  # fmt: skip
def test_a_containers_share_of_the_processors_counts(system, monkeypatch, quota, expected):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    system["/sys/fs/cgroup/cpu.max"] = quota
    assert device.available_threads() == expected


def test_a_file_that_the_system_lacks_is_empty(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert device._read(str(tmp_path / "none")) == device._read(str(tmp_path / "bytes")) == ""
    assert device._read(str(tmp_path)) == ""


def test_a_large_product_that_is_interrupted_does_not_lower_the_peak(monkeypatch):
    """On a CPU with neighbours no long product runs undisturbed."""
    monkeypatch.setattr(device, "_product_flops", lambda n, *_: {1024: 7e9, 256: 9e10}[n])
    assert device.measured_peak_flops(CPU, torch.float32) == 9e10


def test_memory_and_peak_are_plausible():
    held = torch.ones(1 << 20)
    free = device.available_memory(CPU)
    assert free is None or free > 1 << 20
    peak = device.peak_memory(CPU)
    assert peak is None or peak > held.nbytes
    assert device.measured_peak_flops(CPU, torch.float32) > 1e8


@pytest.mark.parametrize(
    ("ranks", "seen"), [("1", "the output\nPython's own end\n"), ("2", "the output\n")]
)
def test_one_of_several_ranks_leaves_without_pythons_own_end(ranks, seen):
    script = (
        "import atexit, sys; from minillm.distributed.ranks import leave; print('the output');"
        'atexit.register(print, "Python\'s own end"); sys.exit(leave(6))'
    )
    place = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **place},
    )
    assert (done.returncode, done.stdout, done.stderr) == (6, seen, "")
