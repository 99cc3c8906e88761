"""What the compiled CUDA kernels are made of, by their disassembly: the wide loads and stores, matrix instructions and
asynchronous copies that were meant are there, and a depthwise tile is multiplied more often than it is read.

No time is measured here. But what this looks for is lost without a word: an assignment of 16 bytes became four stores,
where nvcc no longer saw that its address was aligned.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.test_cuda_compiles import SOURCES, compiled_by_the_build, demangled

ARCHITECTURES = ("sm_80", "sm_90")

Code = dict[str, Counter[str]]
"""By kernel how often each of its instructions stands there, such as ``LDG.E.128``."""


@pytest.fixture(scope="module")
def disassembler() -> str:
    """NVIDIA's, of the toolkit or of Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump on PATH, and none of Triton's")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def built(source: Path, setup_py: dict[str, Any]) -> Path:
    found = compiled_by_the_build(source, setup_py)
    if found is None:
        pytest.skip(f"the build here left no CUDA object of {source.name}")
    return found


def read(disassembler: str, file: Path, architecture: str) -> Code:
    said = subprocess.run(
        [disassembler, "-sass", "-arch", architecture, file], capture_output=True, text=True, check=True
    )
    return counted(said.stdout)


def counted(listing: str) -> Code:
    kernels: Code = {}
    for line in listing.splitlines():
        if name := re.match(r"\s*Function : (\w+)", line):
            kernels[name[1]] = Counter()
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            kernels[next(reversed(kernels))][found[1]] += 1
    return dict(zip(demangled(list(kernels)), kernels.values(), strict=True))


def of_kind(instructions: Counter[str], *starts: str) -> int:
    return sum(count for name, count in instructions.items() if name.startswith(starts))


def test_a_listing_is_read() -> None:
    listing = (
        "\t\tFunction : _Z1fPf\n"
        "        /*0000*/                   LDG.E.128 R4, desc[UR6][R2.64] ;   /* 0x0000000602047981 */\n"
        "                                                                     /* 0x000fc8000ff1e03f */\n"
        "        /*0010*/              @!P0 FFMA R0, R4, R5, R6 ;               /* 0x0000000504007223 */\n"
        "        /*0020*/                   FFMA R0, R4, R5, R6 ;               /* 0x0000000504007223 */\n"
    )
    (instructions,) = counted(listing).values()
    assert instructions == {"LDG.E.128": 1, "FFMA": 2}


def wide(name: str) -> bool:
    """Whether a kernel is the instantiation for 16-byte loads."""
    return re.search(r"<(BFloat16|Float16|Float32), ([48](, true)?|true)>", name) is not None


def per_read(instructions: Counter[str]) -> float:
    """How often numbers are multiplied and added for one that is read from shared memory."""
    words = of_kind(instructions, "LDS") - of_kind(instructions, "LDS.64", "LDS.128")
    return instructions["FFMA"] / max(1, words)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(one, marks=() if one == ARCHITECTURES[-1] else pytest.mark.long) for one in ARCHITECTURES],
)
def test_what_the_kernels_are_made_of(architecture: str, disassembler: str, setup_py: dict[str, Any]) -> None:
    found = {
        name: instructions
        for source in SOURCES
        for name, instructions in read(disassembler, built(source, setup_py), architecture).items()
    }
    print(f"\n{'LDG.128':>7} {'STG.128':>7} {'HMMA':>5} {'LDGSTS':>6} {'FFMA/LDS':>8}  {architecture}")
    for name, of in sorted(found.items()):
        loads, stores, products, copies = (of_kind(of, one) for one in ("LDG.E.128", "STG.E.128", "HMMA", "LDGSTS"))
        print(f"{loads:7} {stores:7} {products:5} {copies:6} {per_read(of):8.1f}  {name}")

    def without(kernels: str, *instructions: str) -> list[str]:
        """Those whose name has the pattern, and that lack one of the instructions."""
        named = {name: of for name, of in found.items() if re.match(kernels, name)}
        assert named, f"no kernel is called {kernels}"
        return [name for name, of in named.items() if not all(of_kind(of, one) for one in instructions)]

    assert not [name for name, of in found.items() if of_kind(of, "LDL", "STL")], "an array in local memory"
    assert not [name for name, of in found.items() if wide(name) and not of_kind(of, "LDG.E.128")]
    assert not without("separate<", "HMMA", "LDGSTS", "LDG.E.128", "STG.E.128")
    assert not without("convolve<|correlate<", "LDG.E.128", "STS.128")
    images = r"(apply|apply_back|spread_moments|finish_norm)<"
    writing = {name: of for name, of in found.items() if wide(name) and re.match(images, name)}
    assert len(writing) == 4 * 3
    assert not [name for name, of in writing.items() if of_kind(of, "STG") != of["STG.E.128"]]
    # A multiprocessor does four multiply-adds in the time of one read. Each loop counts once here, so the tiles of
    # 7 x 7 taps, whose loop is most of them, come near what is multiplied in truth, and the others not.
    tiles = {name: per_read(of) for name, of in found.items() if re.match(r"(convolve|correlate)<.*, 7, ", name)}
    large = {name: share for name, share in tiles.items() if "Resize)2" not in name}
    assert large
    assert min(large.values()) > 3.5, large
    assert min(tiles.values()) > 2.5, tiles  # of stride 2, Resize::kDown, where four results at most share a number
