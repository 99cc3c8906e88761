"""The machine that is measured: its name, its cache, and the clock."""

from __future__ import annotations

import os
import platform
import re
import resource
import time
from pathlib import Path

import torch


def clock(device: str) -> float:
    """Seconds, after all that was asked of the device is done: a GPU's calls return before that.

    With one thread on a CPU it is the processor time of this process, which other processes on the machine disturb
    much less than they disturb the time on the wall; with more threads those wait for one another, which counts.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if by_processor_time(device) else time.perf_counter()


def by_processor_time(device: str) -> bool:
    return device == "cpu" and torch.get_num_threads() == 1


def cache_bytes(device: str) -> int:
    """The last cache before memory."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=2**25)


def memory_bytes(device: str) -> int:
    """What this process holds now."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory_bytes(device: str) -> int:
    """The most that it ever held; ``getrusage`` would count what its parent held when it was started."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def model(device: str) -> str:
    """The processor's or GPU's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(device: str) -> str:
    """The name as a file name: AMD EPYC 9R14 48-Core Processor -> amd-epyc-9r14-48-core."""
    name = re.sub(r"\((R|TM)\)|\bCPU\b.*|\bProcessor\b", "", model(device), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def load() -> str:
    """How busy the machine is, where it says so; beyond the number of its cores, processes wait for one another."""
    if not hasattr(os, "getloadavg"):
        return "load unknown"
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
