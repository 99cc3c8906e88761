"""Kernels written by hand, run on the machine: what its own tests share."""

from __future__ import annotations

import ctypes

import numpy as np

from tests.ptx import machine

U32, U64 = ctypes.c_uint32, ctypes.c_uint64
HEAD = ".version 8.7\n.target sm_80\n.address_size 64\n"
REGISTERS = """.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<64>; .reg .f32 %f<16>; .reg .b64 %rd<16>; .reg .f64 %fd<8>;
ld.param.u64 %rd1, [a]; ld.param.u64 %rd2, [b]; cvta.to.global.u64 %rd1, %rd1; mov.u32 %r1, %tid.x;
"""
SHARED = ".shared .align 16 .b8 s[1024];"
OWN = "mov.u32 %r20, s; shl.b32 %r21, %r1, 2; add.u32 %r22, %r20, %r21;\n"
OUT = "mul.wide.u32 %rd3, %r1, 4; add.u64 %rd3, %rd2, %rd3;\n"


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
