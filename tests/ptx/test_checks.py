"""The machine against small kernels with a fault of each kind, which it finds, and without, where it finds none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import machine
from tests.ptx.by_hand import OUT, OWN, SHARED, kinds, run

pytestmark = pytest.mark.usefixtures("fresh")

EXCHANGE = (
    OWN
    + "st.shared.u32 [%r22], %r1; BARRIER xor.b32 %r23, %r21, OTHER; add.u32 %r23, %r23, %r20; ld.shared.u32 %r24, [%r23];\n"
)
EXCHANGE += OUT + "st.global.u32 [%rd3], %r24;"


@pytest.mark.parametrize("order", machine.ORDERS)
@pytest.mark.parametrize(("barrier", "other", "race"), [
    ("bar.sync 0;", 128, False), ("bar.warp.sync -1;", 4, False), ("", 0, False),
    ("", 4, True), ("", 128, True), ("bar.warp.sync -1;", 128, True),
    ("shfl.sync.bfly.b32 %r30, %r1, 1, 31, -1;", 4, True),  # orders no memory
])  # fmt: skip
def test_races_in_shared_memory(order, barrier, other, race):
    machine.settings(order, seed=1)
    a, b = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    found = run(EXCHANGE.replace("BARRIER", barrier).replace("OTHER", str(other)), a, b, threads=64, shared=SHARED)
    assert ("race" in kinds(found)) == race, found


def test_a_write_after_a_read():
    a, b = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    body = (
        OWN + "st.shared.u32 [%r22], %r1; bar.sync 0; ld.shared.u32 %r24, [s+BYTE]; BARRIER st.shared.u32 [%r22], %r24;"
    )
    body += OUT + "st.global.u32 [%rd3], %r24;"
    for barrier, race in {"": True, "bar.sync 0;": False}.items():
        found = run(body.replace("BARRIER", barrier).replace("BYTE", "200"), a, b, threads=64, shared=SHARED)
        assert kinds(found) == (["race"] if race else [])


def test_uninitialised_and_outside():
    a, b = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    assert kinds(
        run(OWN + "ld.shared.u32 %r2, [%r22+128];" + OUT + "st.global.u32 [%rd3], %r2;", a, b, shared=SHARED)
    ) == ["uninitialised"]
    assert kinds(run(OWN + "st.shared.u32 [%r22+1000], %r1;", a, b, shared=SHARED)) == ["out of bounds"]
    found = run(OUT + "st.global.u32 [%rd3+4], %r1;", a, b)
    assert kinds(found) == ["out of bounds"]
    assert found[0]["thread"] == 31
    assert "byte 128 of a buffer of 128" in found[0]["detail"]
    assert kinds(run(OUT + "ld.global.u32 %r2, [%rd3+-4];", a, b)) == ["out of bounds"]
    assert kinds(
        run(
            "mul.wide.u32 %rd3, %r1, 4; add.u64 %rd3, %rd2, %rd3; st.global.v2.u32 [%rd3], {%r1, %r1};",
            a,
            np.zeros(64, np.uint32),
        )
    ) == ["conflict", "misaligned"]


def test_blocks_that_meet_in_global_memory():
    a, b = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    head = OUT + "mov.u32 %r2, %ctaid.x;"
    assert kinds(run(head + "st.global.u32 [%rd3], %r2;", a, b, blocks=2)) == ["race"]
    assert kinds(run(head + "st.global.u32 [%rd3], %r1;", a, b, blocks=2)) == []  # the same value
    reads = head + "ld.global.u32 %r3, [%rd3]; bar.sync 0; setp.eq.u32 %p1, %r2, WHICH; @%p1 st.global.u32 [%rd3], 7;"
    for which in (0, 1):
        for order in ("ascending", "descending"):
            machine.settings(order)
            b[:] = 0
            assert kinds(run(reads.replace("WHICH", str(which)), a, b, blocks=2)) == ["race"]
    apart = head + "mul.wide.u32 %rd4, %r2, 128; add.u64 %rd3, %rd3, %rd4; st.global.u32 [%rd3], %r2;"
    assert run(apart, a, b, blocks=2) == []


COPY = """mul.wide.u32 %rd4, %r1, 16; add.u64 %rd4, %rd1, %rd4; mov.u32 %r20, s; shl.b32 %r21, %r1, 4; add.u32 %r22, %r20, %r21;
cp.async.cg.shared.global [%r22], [%rd4], 16; WAIT
ld.shared.v4.u32 {%r2,%r3,%r4,%r5}, [%r22]; mul.wide.u32 %rd3, %r1, 16; add.u64 %rd3, %rd2, %rd3; st.global.v4.b32 [%rd3], {%r2,%r3,%r4,%r5};
cp.async.wait_all;"""


@pytest.mark.parametrize(("wait", "good"), [
    ("cp.async.wait_all;", True), ("cp.async.commit_group; cp.async.wait_group 0;", True), ("", False),
    ("cp.async.commit_group; cp.async.wait_group 1;", False), ("cp.async.wait_group 0;", False),
])  # fmt: skip
def test_copies(wait, good):
    a, b = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    found = run(COPY.replace("WAIT", wait), a, b, shared=SHARED)
    assert kinds(found) == ([] if good else ["cp.async"])
    assert np.array_equal(a, b) == good
    if good:
        other = (
            COPY.replace("WAIT", wait)
            .replace("[%r22]; mul", "[%r22x]; mul")
            .replace("ld.shared.v4", "xor.b32 %r23, %r21, 16; add.u32 %r23, %r23, %r20; ld.shared.v4")
            .replace("%r22x", "%r23")
        )
        assert kinds(run(other, a, b, shared=SHARED)) == ["race"]  # another thread's copy, without a barrier


def test_barriers():
    a, b = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    with pytest.raises(machine.PtxError, match="barrier"):
        run(
            "setp.lt.u32 %p1, %r1, 32; @%p1 bra $out; bar.sync 0; bar.sync 0; $out: @%p1 bar.sync 0; @%p1 bar.sync 1;",
            a,
            b,
            threads=64,
        )
    assert "barrier" in kinds(machine.findings())
    with pytest.raises(machine.PtxError, match="never arrive"):
        run(
            "setp.lt.u32 %p1, %r1, 5; @%p1 bra $out; bar.sync 0; ret; $out: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
            a,
            b,
        )
    assert "convergence" in kinds(machine.findings())
    run("setp.lt.u32 %p1, %r1, 32; @%p1 bra $out; bar.sync 0; ret; $out: bar.sync 0;", a, b, threads=64)
    found = run("setp.lt.u32 %p1, %r1, 32; @%p1 bra $out; bar.sync 0; ret; $out: bar.sync 0;", a, b, threads=64)
    assert kinds(found) == ["barrier"]  # different instructions
    assert (
        run("setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", a, b, threads=64) == []
    )  # who has exited is not waited for
    found = run("setp.eq.u32 %p1, %r1, 3; @%p1 ret; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", a, b)
    assert kinds(found) == ["shuffle"]


def test_launches_that_a_gpu_refuses():
    a, b = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    dynamic = ".extern .shared .align 16 .b8 d[];"
    with pytest.raises(machine.PtxError, match="cudaFuncSetAttribute"):
        run("mov.u32 %r2, d;", a, b, shared=dynamic, dynamic=50000)
    with pytest.raises(machine.PtxError, match="threads"):
        run("", a, b, threads=1056)
    with pytest.raises(machine.PtxError, match="not known"):
        run("frobnicate.b32 %r2, %r1;", a, b)
    with pytest.raises(machine.PtxError, match="strange"):
        run("add.strange.s32 %r2, %r1, %r1;", a, b)
    with pytest.raises(machine.PtxError, match="bytes"):
        run("add.s32 %rd3, %r1, %r1;", a, b)


def test_counts():
    a, b = np.zeros(1024, np.uint32), np.zeros(1024, np.uint32)
    for stride, wavefronts in {4: 1, 8: 2, 128: 8, 132: 1, 0: 1}.items():
        run(
            f"mul.lo.u32 %r2, %r1, {stride}; and.b32 %r2, %r2, 0x3ff; mov.u32 %r3, s; add.u32 %r3, %r3, %r2; st.shared.u32 [%r3], 1;",
            a,
            b,
            shared=SHARED,
        )
        assert machine.counts()["opcodes"]["st.shared.u32"] == [1, 32, 128, wavefronts, 1], stride
    for stride, sectors in {4: 4, 8: 8, 32: 32, 0: 1}.items():
        run(f"mul.wide.u32 %rd3, %r1, {stride}; add.u64 %rd3, %rd2, %rd3; ld.global.u32 %r2, [%rd3];", a, b)
        off = b.ctypes.data % 32 != 0
        assert machine.counts()["opcodes"]["ld.global.u32"][:3] == [1, 32, 128]
        assert sectors <= machine.counts()["opcodes"]["ld.global.u32"][3] <= sectors + off
        assert machine.counts()["bytes_read"] == (4 if stride == 0 else 128)
    run(
        "mov.u32 %r3, s; shl.b32 %r2, %r1, 4; add.u32 %r3, %r3, %r2; st.shared.v4.u32 [%r3], {1, 1, 1, 1};",
        a,
        b,
        shared=SHARED,
    )
    assert machine.counts()["opcodes"]["st.shared.v4.u32"] == [1, 32, 512, 4, 4]
