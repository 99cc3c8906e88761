"""The machine against small kernels written by hand: each family of opcodes, and each of the checks."""

from __future__ import annotations

import ctypes
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx import build, machine

U32, U64 = ctypes.c_uint32, ctypes.c_uint64
HEAD = ".version 8.7\n.target sm_80\n.address_size 64\n"
REGISTERS = """.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<64>; .reg .f32 %f<16>; .reg .b64 %rd<16>; .reg .f64 %fd<8>;
ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; cvta.to.global.u64 %rd1, %rd1; mov.u32 %r1, %tid.x;
"""


@pytest.fixture(scope="module", autouse=True)
def built():
    try:
        with build.alone("machine"):
            build.machine()
    except build.BuildError as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def fresh(built):
    machine.settings()
    machine.findings()


def run(body, a, b, threads=32, blocks=1, shared="", dynamic=0, registers=REGISTERS):
    """Run ``body`` with %rd1 and %rd2 the addresses of a and b and %r1 the thread; returns what was found."""
    text = f"{HEAD}{shared}\n.visible .entry k(.param .u64 a, .param .u64 b)\n{{\n{registers}\n{body}\nret;\n}}\n"
    machine.buffer(a), machine.buffer(b)
    try:
        machine.Module(text).launch("k", (blocks,), (threads,), a, b, shared=dynamic)
    finally:
        machine.forget(a), machine.forget(b)
    return machine.findings()


def kinds(found):
    return sorted({f["kind"] for f in found})


def lanes(op, *sources, types, result):
    """One instruction on 32 lanes: operands of `types`, from arrays of 32; the result of `result`."""
    data = np.zeros((len(sources), 32), np.uint64)
    for k, source in enumerate(sources):
        source = np.asarray(source)
        data[k, : len(source)] = source.view(f"u{source.itemsize}")
    out = np.zeros(32, np.uint64)
    text, names = "mul.wide.u32 %rd3, %r1, 8; add.u64 %rd3, %rd1, %rd3;\n", []
    for k, kind in enumerate(types):
        register = {1: "%q", 2: "%x", 4: "%y", 8: "%z"}[kind] + str(k)
        read = {1: "u64", 2: "u16", 4: "u32", 8: "u64"}[kind]
        if kind == 1:
            text += f"ld.global.u64 %rd4, [%rd3+{256 * k}]; setp.ne.u64 {register}, %rd4, 0;\n"
        else:
            text += f"ld.global.{read} {register}, [%rd3+{256 * k}];\n"
        names.append(register)
    target = {1: "%q9", 2: "%x9", 4: "%y9", 8: "%z9"}[result]
    text += f"{op} {target}, {', '.join(names)};\n"
    store = {
        1: "selp.u64 %rd5, 1, 0, %q9;",
        2: "cvt.u64.u16 %rd5, %x9;",
        4: "cvt.u64.u32 %rd5, %y9;",
        8: "mov.u64 %rd5, %z9;",
    }
    text += store[result] + "mul.wide.u32 %rd6, %r1, 8; add.u64 %rd6, %rd2, %rd6; st.global.u64 [%rd6], %rd5;"
    more = REGISTERS + ".reg .pred %q<10>; .reg .b16 %x<10>; .reg .b32 %y<10>; .reg .b64 %z<10>;"
    assert run(text, data, out, registers=more) == []
    return out


RNG = np.random.default_rng(0)
A32, B32 = (RNG.integers(-(2**31), 2**31, 32, dtype=np.int64).astype(np.int32) for _ in range(2))
A64, B64 = (RNG.integers(-(2**63), 2**63 - 1, 32, dtype=np.int64) for _ in range(2))
AF = RNG.standard_normal(32).astype(np.float32)
BF = RNG.standard_normal(32).astype(np.float32)
AF[0], BF[1], AF[2], BF[2] = np.nan, np.nan, 0.0, -0.0
SMALL = np.arange(32, dtype=np.uint32)
U = np.uint32


def as_f(bits):
    return bits.astype(np.uint32).view(np.float32)


INTEGERS = {
    "add.s32": lambda a, b: a + b, "sub.s32": lambda a, b: a - b, "mul.lo.s32": lambda a, b: a * b,
    "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b, "xor.b32": lambda a, b: a ^ b,
    "min.s32": np.minimum, "max.s32": np.maximum,
    "min.u32": lambda a, b: np.minimum(a.view(U), b.view(U)), "max.u32": lambda a, b: np.maximum(a.view(U), b.view(U)),
    "mul.hi.s32": lambda a, b: (a.astype(np.int64) * b >> 32).astype(np.int32),
    "mul.hi.u32": lambda a, b: (a.view(U).astype(np.uint64) * b.view(U) >> np.uint64(32)).astype(U),
    "div.s32": lambda a, b: np.array([int(x / y) if abs(int(x)) < 2**52 else 0 for x, y in zip(a.tolist(), b.tolist())], np.int32),
    "rem.s32": lambda a, b: np.array([int(np.fmod(x, y)) for x, y in zip(a.tolist(), b.tolist())], np.int32),
    "div.u32": lambda a, b: a.view(U) // b.view(U), "rem.u32": lambda a, b: a.view(U) % b.view(U),
}  # fmt: skip


@pytest.mark.parametrize("op", INTEGERS)
def test_integers(op):
    with np.errstate(all="ignore"):
        expected = INTEGERS[op](A32, B32).view(U)
    assert np.array_equal(lanes(op, A32, B32, types=(4, 4), result=4).astype(U), expected)


def test_wide_products():
    assert np.array_equal(
        lanes("mul.wide.s32", A32, B32, types=(4, 4), result=8).view(np.int64), A32.astype(np.int64) * B32
    )
    unsigned = A32.view(U).astype(np.uint64) * B32.view(U)
    assert np.array_equal(lanes("mul.wide.u32", A32, B32, types=(4, 4), result=8), unsigned)
    with np.errstate(all="ignore"):
        assert np.array_equal(
            lanes("mad.wide.s32", A32, B32, A64, types=(4, 4, 8), result=8).view(np.int64),
            A32.astype(np.int64) * B32 + A64,
        )
        assert np.array_equal(
            lanes("mad.lo.s32", A32, B32, A32, types=(4, 4, 4), result=4).astype(U).view(np.int32), A32 * B32 + A32
        )
    a16, b16 = A32.astype(np.int16), B32.astype(np.int16)
    assert np.array_equal(
        lanes("mul.wide.s16", a16, b16, types=(2, 2), result=4).astype(U).view(np.int32), a16.astype(np.int32) * b16
    )
    high = (a16.view(np.uint16).astype(U) * b16.view(np.uint16) >> U(16)).astype(np.uint16)
    assert np.array_equal(lanes("mul.hi.u16", a16, b16, types=(2, 2), result=2).astype(np.uint16), high)


def test_shifts_and_fields():
    by = (SMALL * 3).astype(U)  # beyond 31 too
    wanted = [(int(a) & 0xFFFFFFFF) << int(s) & 0xFFFFFFFF if s < 32 else 0 for a, s in zip(A32, by)]
    assert lanes("shl.b32", A32, by, types=(4, 4), result=4).tolist() == wanted
    assert lanes("shr.s32", A32, by, types=(4, 4), result=4).tolist() == [
        (int(a) >> min(int(s), 31)) & 0xFFFFFFFF for a, s in zip(A32, by)
    ]
    assert lanes("shr.u32", A32, by, types=(4, 4), result=4).tolist() == [
        (int(a) & 0xFFFFFFFF) >> int(s) if s < 32 else 0 for a, s in zip(A32, by)
    ]

    def field(a, p, n, signed):  # as the PTX ISA's pseudo code has it
        msb = 31
        a &= 0xFFFFFFFF
        sign = 0 if not signed or n == 0 else a >> min(p + n - 1, msb) & 1
        return sum(((a >> p + i & 1) if i < n and p + i <= msb else sign) << i for i in range(32))

    p, n = SMALL, (SMALL * 7 % 34).astype(U)
    for kind in ("u32", "s32"):
        wanted = [field(int(a), int(x), int(y), kind == "s32") for a, x, y in zip(A32, p, n)]
        assert lanes(f"bfe.{kind}", A32, p, n, types=(4, 4, 4), result=4).tolist() == wanted
    wanted = []
    for a, b, x, y in zip(A32, B32, p, n):
        f = int(b) & 0xFFFFFFFF
        for i in range(int(y)):
            if x + i <= 31:
                f = f & ~(1 << int(x) + i) | (int(a) >> i & 1) << int(x) + i
        wanted.append(f)
    assert lanes("bfi.b32", A32, B32, p, n, types=(4, 4, 4, 4), result=4).tolist() == wanted
    wanted = []
    for a, b, s in zip(A32, B32, B32[::-1]):
        both = [*struct.pack("<i", a), *struct.pack("<i", b)]
        byte = [
            both[int(s) >> 4 * k & 7] if not int(s) >> 4 * k & 8 else 255 * (both[int(s) >> 4 * k & 7] >> 7)
            for k in range(4)
        ]
        wanted.append(struct.unpack("<I", bytes(byte))[0])
    assert lanes("prmt.b32", A32, B32, B32[::-1].copy(), types=(4, 4, 4), result=4).tolist() == wanted


FLOATS = {
    "add.f32": np.add, "sub.f32": np.subtract, "mul.f32": np.multiply, "div.rn.f32": np.divide, "div.full.f32": np.divide,
    "max.f32": np.fmax, "min.f32": np.fmin, "max.NaN.f32": np.maximum, "min.NaN.f32": np.minimum,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_floats_are_rounded_once(kind):
    """Against PyTorch, whose float32 sums and products of them round to the same; its double, for three operands."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(32, generator=generator).mul(8**power).to(dtype) for power in (0, 1, -1))
    bits = [one.view(torch.int16).numpy() for one in (a, b, c)]
    for op, wanted in (("add", a + b), ("sub", a - b), ("mul", a * b)):
        got = lanes(f"{op}.{kind}", *bits[:2], types=(2, 2), result=2)
        assert got.astype(np.int16).tolist() == wanted.view(torch.int16).tolist(), op
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist())]
    got = lanes(f"fma.rn.{kind}", *bits, types=(2, 2, 2), result=2).astype(np.int16)
    got = torch.from_numpy(got).view(dtype)
    for one, value in zip(got, exact):
        beside = [torch.nextafter(one, torch.tensor(to, dtype=dtype)) for to in (-torch.inf, torch.inf)]
        assert all(abs(Fraction(one.item()) - value) <= abs(Fraction(other.item()) - value) for other in beside)


@pytest.mark.parametrize("op", FLOATS)
def test_floats(op):
    with np.errstate(all="ignore"):
        expected = FLOATS[op](AF, BF)
    np.testing.assert_array_equal(as_f(lanes(op, AF, BF, types=(4, 4), result=4)), expected)


def test_more_floats():
    positive = np.abs(AF) + np.float32(0.1)
    for op, f in {"rcp.rn.f32": lambda x: np.float32(1) / x, "sqrt.rn.f32": np.sqrt, "neg.f32": np.negative, "abs.f32": np.abs,
                  "ex2.approx.f32": lambda x: np.exp2(x.astype(np.float64)), "rsqrt.approx.f32": lambda x: 1 / np.sqrt(x.astype(np.float64))}.items():  # fmt: skip
        np.testing.assert_allclose(as_f(lanes(op, positive, types=(4,), result=4)), f(positive), rtol=1e-7)
    c = np.float32(1e-8) * BF
    exact = AF.astype(np.float64) * BF + c
    np.testing.assert_array_equal(
        as_f(lanes("fma.rn.f32", AF, BF, c, types=(4, 4, 4), result=4)), exact.astype(np.float32)
    )
    below = as_f(lanes("fma.rm.f32", AF, BF, c, types=(4, 4, 4), result=4)).astype(np.float64)
    good = ~np.isnan(exact)
    assert (below[good] <= exact[good]).all()
    assert (np.nextafter(below[good].astype(np.float32), np.float32(np.inf)) > exact[good]).all()
    d = np.linspace(-3, 3, 32)
    wanted = [float(Fraction(x) * Fraction(x) + Fraction(x)) for x in d]
    assert lanes("fma.rn.f64", d, d, d, types=(8, 8, 8), result=8).view(np.float64).tolist() == wanted


def test_comparisons():
    both = np.isnan(AF) | np.isnan(BF)
    with np.errstate(all="ignore"):
        wanted = {
            "eq": AF == BF,
            "ne": (AF != BF) & ~both,
            "lt": AF < BF,
            "le": AF <= BF,
            "gt": AF > BF,
            "ge": AF >= BF,
        }
    for name, value in wanted.items():
        assert np.array_equal(lanes(f"setp.{name}.f32", AF, BF, types=(4, 4), result=1) != 0, value), name
        assert np.array_equal(lanes(f"setp.{name}u.f32", AF, BF, types=(4, 4), result=1) != 0, value | both), name
    assert np.array_equal(lanes("setp.lt.u32", A32, B32, types=(4, 4), result=1) != 0, A32.view(U) < B32.view(U))
    assert np.array_equal(lanes("setp.lt.s64", A64, B64, types=(8, 8), result=1) != 0, A64 < B64)
    assert np.array_equal(
        lanes("selp.b32", A32, B32, (SMALL % 2).astype(np.uint64), types=(4, 4, 1), result=4).astype(U),
        np.where(SMALL % 2, A32, B32).view(U),
    )


def test_comparisons_of_halves():
    a, b = AF.astype(np.float16), BF.astype(np.float16)
    with np.errstate(all="ignore"):
        assert np.array_equal(lanes("setp.le.f16", a, b, types=(2, 2), result=1) != 0, a <= b)
        assert np.array_equal(lanes("setp.leu.f16", a, b, types=(2, 2), result=1) != 0, ~(a > b))
    words, out = (a.view(np.uint16) | b.view(np.uint16).astype(U) << U(16)).astype(U), np.zeros((2, 32), U)
    body = """mul.wide.u32 %rd3, %r1, 4; add.u64 %rd4, %rd1, %rd3; add.u64 %rd5, %rd2, %rd3; ld.global.u32 %r2, [%rd4];
    setp.gt.f16x2 %p1|%p2, %r2, 0; selp.u32 %r3, 1, 0, %p1; selp.u32 %r4, 1, 0, %p2; st.global.u32 [%rd5], %r3; st.global.u32 [%rd5+128], %r4;"""
    assert run(body, words, out) == []
    with np.errstate(all="ignore"):
        assert np.array_equal(out != 0, np.stack([a > 0, b > 0]))


def test_conversions():
    import torch

    f = np.concatenate(
        [
            AF[3:15] * 1e4,
            np.array([np.inf, -np.inf, 65519.9, 65520, 1e-7, 6e-8, 1e-40, 3.3895e38], np.float32),
            BF[3:15],
        ]
    ).astype(np.float32)
    t = torch.from_numpy(f)
    for name, dtype in {"f16": torch.float16, "bf16": torch.bfloat16}.items():
        bits = t.to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert np.array_equal(lanes(f"cvt.rn.{name}.f32", f, types=(4,), result=2).astype(np.uint16), bits), name
        np.testing.assert_array_equal(
            as_f(lanes(f"cvt.f32.{name}", bits, types=(2,), result=4)), t.to(dtype).float().numpy()
        )
        pair = bits.astype(U) << U(16) | bits[::-1].astype(U)
        assert np.array_equal(lanes(f"cvt.rn.{name}x2.f32", f, f[::-1].copy(), types=(4, 4), result=4).astype(U), pair)
    b = f.view(U).astype(np.uint64)
    tf32 = np.where(np.isinf(f), b, b + 0x1000 & 0xFFFFE000)
    assert np.array_equal(lanes("cvt.rna.tf32.f32", f, types=(4,), result=4), tf32)
    assert np.array_equal(lanes("cvt.s64.s32", A32, types=(4,), result=8).view(np.int64), A32)
    assert np.array_equal(lanes("cvt.u64.u32", A32, types=(4,), result=8), A32.view(U))
    assert np.array_equal(lanes("cvt.u32.u64", A64, types=(8,), result=4).astype(U), A64.astype(U))
    np.testing.assert_array_equal(as_f(lanes("cvt.rn.f32.s64", A64, types=(8,), result=4)), A64.astype(np.float32))
    np.testing.assert_array_equal(as_f(lanes("cvt.rn.f32.s32", A32, types=(4,), result=4)), A32.astype(np.float32))
    assert lanes("cvt.rzi.s32.f32", np.array([1.9, -1.9, 3e9, -3e9, np.nan], np.float32), types=(4,), result=4).astype(
        U
    ).view(np.int32).tolist()[:5] == [1, -1, 2**31 - 1, -(2**31), 0]
    np.testing.assert_array_equal(
        as_f(lanes("cvt.sat.f32.f32", AF, types=(4,), result=4)),
        np.where(np.isnan(AF), 0, np.clip(AF, 0, 1)).astype(np.float32),
    )


def test_packing_narrow_accesses_and_inner_scopes():
    a, b = np.zeros(32, np.uint32), np.zeros(96, np.uint32)
    body = """{ .reg .b16 %low; .reg .b16 %high;
      mov.b32 {%low, %high}, 0x80017fff; mov.b32 %r2, {%high, %low}; }
    mul.wide.u32 %rd3, %r1, 4; add.u64 %rd3, %rd2, %rd3; st.global.u32 [%rd3], %r2;
    st.global.u8 [%rd3+128], %r1; ld.global.s8 %h1, [%rd3+3]; cvt.s32.s16 %r3, %h1; st.global.b32 [%rd3+256], %r3;"""
    assert run(body, a, b) == []
    assert (b[:32] == 0x7FFF8001).all()
    assert (b[32:64] == np.arange(32)).all()
    assert (b[64:].view(np.int32) == 0x7F).all()


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
    import torch

    k = 8 if kind == "tf32" else 16
    a, b, c = (RNG.integers(-8, 8, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    words = np.zeros((10, 32), np.uint32)

    def bits(v):
        if kind == "tf32":
            return int(np.float32(v).view(U))
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
            words[6 + i, lane] = int(c[group if i < 2 else group + 8, thread * 2 + (i & 1)].view(U))
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


SHARED = ".shared .align 16 .b8 s[1024];"
OWN = "mov.u32 %r20, s; shl.b32 %r21, %r1, 2; add.u32 %r22, %r20, %r21;\n"
OUT = "mul.wide.u32 %rd3, %r1, 4; add.u64 %rd3, %rd2, %rd3;\n"


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


# ---- the checks --------------------------------------------------------------------------------------------------

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
