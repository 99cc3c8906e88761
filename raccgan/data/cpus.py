"""How many processors this process may use: those of its affinity, within the quota of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path


def usable_cpus() -> int:
    """At least 1; a quota of 1.5 processors counts as 2."""
    return min(len(os.sched_getaffinity(0)), quota_cpus())


@cache
def quota_cpus(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """The processors that the control groups of this process grant, such as those of its container; without a quota
    more than any machine has."""
    return max(1, min((math.ceil(quota) for quota in _quotas(groups, membership)), default=1 << 20))


def _quotas(groups: Path, membership: Path) -> Iterator[float]:
    """The quota, in processors, of every group that this process is in, in either version of control groups."""
    lines = []
    with suppress(OSError):
        lines = [line.split(":", 2) for line in membership.read_text().splitlines() if line.count(":") >= 2]
    for _, controllers, name in lines:
        if controllers == "":  # version 2: one hierarchy
            roots = [groups, groups / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [groups / controllers, groups / "cpu"]
        else:
            continue
        for root in roots:
            innermost = root / name.lstrip("/")
            # A quota binds all groups inside. In a container its own group may be mounted as the root, under no name.
            for folder in {innermost, *innermost.parents, root}:
                if folder == root or root in folder.parents:
                    yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        if quota != "max":
            yield int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota, period = ((folder / f"cpu.cfs_{part}_us").read_text() for part in ("quota", "period"))
        if int(quota) > 0:  # -1 is none
            yield int(quota) / int(period)
