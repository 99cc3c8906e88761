"""The machine against small kernels written by hand: lanes that part, meet, shuffle and multiply matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx import machine
from tests.ptx.by_hand import OUT, SHARED, run

pytestmark = pytest.mark.usefixtures("fresh")

RNG = np.random.default_rng(0)


def test_a_loop_whose_lanes_leave_at_different_times():
    a, b = np.zeros(32, np.uint32), np.zeros(32, np.uint32)
    body = """mov.u32 %r2, 0; mov.u32 %r3, 0;
    $again: add.u32 %r3, %r3, %r2; add.u32 %r2, %r2, 1; setp.le.u32 %p1, %r2, %r1; @%p1 bra $again;
    mul.wide.u32 %rd3, %r1, 4; add.u64 %rd3, %rd2, %rd3; st.global.u32 [%rd3], %r3;"""
    for order in machine.ORDERS:
        machine.settings(order, seed=5)
        b[:] = 0
        assert run(body, a, b) == []
        assert b.tolist() == [n * (n + 1) // 2 for n in range(32)]
    machine.settings()
    run(body, a, b)
    assert machine.counts()["opcodes"]["st.global.u32"][:2] == [1, 32]  # they met again


def test_shuffles():
    a, b = np.zeros(32, np.uint32), np.zeros((5, 32), np.uint32)
    body = "mul.wide.u32 %rd3, %r1, 4; add.u64 %rd3, %rd2, %rd3; add.u32 %r9, %r1, 100;\n"
    for k, (op, by, clamp) in enumerate(
        [("bfly", 5, 31), ("idx", 7, 31), ("up", 3, 0), ("down", 3, 31), ("idx", 1, 0x1C1F)]
    ):
        body += f"shfl.sync.{op}.b32 %r2|%p1, %r9, {by}, {clamp}, -1; st.global.u32 [%rd3+{128 * k}], %r2;\n"
    assert run(body, a, b) == []
    n = np.arange(32)
    assert (
        b.tolist()
        == (
            100 + np.array([n ^ 5, 0 * n + 7, np.where(n < 3, n, n - 3), np.where(n > 28, n, n + 3), n // 4 * 4 + 1])
        ).tolist()
    )


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_products(kind):
    """a [16, K] b [K, 8] + c, each lane's registers filled by the PTX ISA's row and column formulas, element by element."""

    k = 8 if kind == "tf32" else 16
    a, b, c = (RNG.integers(-8, 8, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    words = np.zeros((10, 32), np.uint32)

    def bits(v):
        if kind == "tf32":
            return int(np.float32(v).view(np.uint32))
        t = torch.tensor(float(v)).to(torch.float16 if kind == "f16" else torch.bfloat16)
        return int(t.view(torch.int16)) & 0xFFFF

    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        if kind == "tf32":
            for i in range(4):
                row = group if i in (0, 2) else group + 8
                words[i, lane] = bits(a[row, thread if i in (0, 1) else thread + 4])
            for i in range(2):
                words[4 + i, lane] = bits(b[thread + 4 * i, group])
        else:
            for i in range(8):
                row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
                column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
                words[i // 2, lane] |= bits(a[row, column]) << 16 * (i & 1)
            for i in range(4):
                words[4 + i // 2, lane] |= bits(b[thread * 2 + (i & 1) + (0 if i < 2 else 8), group]) << 16 * (i & 1)
        for i in range(4):
            words[6 + i, lane] = int(c[group if i < 2 else group + 8, thread * 2 + (i & 1)].view(np.uint32))
    out = np.zeros((4, 32), np.float32)
    body = "mul.wide.u32 %rd3, %r1, 4; add.u64 %rd4, %rd1, %rd3; add.u64 %rd5, %rd2, %rd3;\n"
    body += "".join(f"ld.global.u32 %r{10 + i}, [%rd4+{128 * i}];\n" for i in range(6))
    body += "".join(f"ld.global.f32 %f{i}, [%rd4+{128 * (6 + i)}];\n" for i in range(4))
    shape = "m16n8k8" if kind == "tf32" else "m16n8k16"
    body += f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {{%f4,%f5,%f6,%f7}}, {{%r10,%r11,%r12,%r13}}, {{%r14,%r15}}, {{%f0,%f1,%f2,%f3}};\n"
    body += "".join(f"st.global.f32 [%rd5+{128 * i}], %f{4 + i};\n" for i in range(4))
    assert run(body, words, out) == []
    product = a @ b + c
    for lane in range(32):
        for i in range(4):
            assert out[i, lane] == product[(lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_loads(transposed):
    a, out = np.arange(256, dtype=np.uint16), np.zeros((4, 32), np.uint32)
    body = """mul.wide.u32 %rd4, %r1, 16; add.u64 %rd4, %rd1, %rd4; ld.global.v4.u32 {%r2,%r3,%r4,%r5}, [%rd4];
    mov.u32 %r20, s; shl.b32 %r21, %r1, 4; add.u32 %r22, %r20, %r21; st.shared.v4.u32 [%r22], {%r2,%r3,%r4,%r5}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4%s.shared.b16 {%%r6,%%r7,%%r8,%%r9}, [%%r22];""".replace(
        "%s", ".trans" if transposed else ""
    ).replace("%%", "%")
    body += OUT + "".join(f"st.global.u32 [%rd3+{128 * m}], %r{6 + m};\n" for m in range(4))
    assert run(body, a, out, shared=SHARED) == []
    matrices = a.reshape(4, 8, 8)
    for m in range(4):
        of = matrices[m].T if transposed else matrices[m]
        for lane in range(32):
            assert out[m, lane] == int(of[lane // 4, lane % 4 * 2]) | int(of[lane // 4, lane % 4 * 2 + 1]) << 16
