"""The machine against small kernels written by hand: arithmetic, comparisons, conversions."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx.by_hand import lanes, run

pytestmark = pytest.mark.usefixtures("fresh")

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
