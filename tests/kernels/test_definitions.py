"""The references against their formulas, written out literally, one number at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from raccgan.kernels.cbam import CbamWeights, cbam
from raccgan.kernels.depthwise_separable import Prologue, Resize, Weights, depthwise_separable
from tests.kernels.compare import assert_each_close


def at(x: Tensor, n: int, c: int, i: int, j: int) -> Tensor:
    """x[n, c, i, j], zero outside."""
    inside = 0 <= i < x.shape[2] and 0 <= j < x.shape[3]
    return x[n, c, i, j] if inside else x.new_zeros(())


def test_depthwise_separable_literally() -> None:
    torch.manual_seed(0)
    n, c, d, h, w, k = 2, 3, 2, 2, 3, 3
    x, scale, shift = torch.randn(n, c, h, w), torch.randn(n, c), torch.randn(n, c)
    wd, bd, wp, bp = torch.randn(c, 1, k, k), torch.randn(c), torch.randn(d, c, 1, 1), torch.randn(d)
    residual = torch.randn(n, d, h, w)
    weights, prologue = Weights(wd, bd, wp, bp), Prologue(scale=scale, shift=shift, relu=True)
    got = depthwise_separable(x, weights, prologue, Resize(2, 2), residual=residual, kernels="reference")
    up = torch.empty(n, c, 2 * h, 2 * w)
    for s in range(n):
        for ch in range(c):
            for i in range(2 * h):
                for j in range(2 * w):
                    up[s, ch, i, j] = max(0.0, float(x[s, ch, i // 2, j // 2] * scale[s, ch] + shift[s, ch]))
    for s in range(n):
        for o in range(d):
            for i in range(h):
                for j in range(w):
                    total = torch.zeros(())
                    for p in ((2 * i + a, 2 * j + b) for a in range(2) for b in range(2)):
                        y = bp[o].clone()
                        for ch in range(c):
                            taps = (
                                wd[ch, 0, u, v] * at(up, s, ch, p[0] + u - k // 2, p[1] + v - k // 2)
                                for u in range(k)
                                for v in range(k)
                            )
                            y += wp[o, ch, 0, 0] * (bd[ch] + sum(taps))
                        total += y / 4
                    assert_each_close(got[s, o, i, j], total + residual[s, o, i, j], rtol=1e-4, atol=1e-5)


def test_cbam_literally() -> None:
    torch.manual_seed(0)
    n, c, r, h, w, k = 2, 4, 2, 3, 5, 7
    x = torch.randn(n, c, h, w)
    w1, b1, w2, b2 = torch.randn(r, c), torch.randn(r), torch.randn(c, r), torch.randn(c)
    ws, gamma, beta = torch.randn(1, 2, k, k), torch.randn(1), torch.randn(1)
    got = cbam(x, CbamWeights(w1, b1, w2, b2, ws, gamma, beta), kernels="reference")
    for s in range(n):
        average = torch.stack([x[s, ch].mean() for ch in range(c)])
        maximum = torch.stack([x[s, ch].max() for ch in range(c)])

        def mlp(v: Tensor) -> Tensor:
            return w2 @ (w1 @ v + b1).clamp(min=0) + b2

        gated = x[s] * torch.sigmoid(mlp(average) + mlp(maximum))[:, None, None]
        planes = torch.stack([gated.max(dim=0).values, gated.mean(dim=0)])[None]
        conv = torch.empty(h, w)
        for i in range(h):
            for j in range(w):
                conv[i, j] = sum(
                    ws[0, q, u, v] * at(planes, 0, q, i + u - k // 2, j + v - k // 2)
                    for q in range(2)
                    for u in range(k)
                    for v in range(k)
                )
        mean, var = conv.mean(), conv.var(correction=0)
        gate = torch.sigmoid((conv - mean) / (var + 1e-5).sqrt() * gamma + beta)
        assert_each_close(got.y[s], gated * gate, rtol=1e-4, atol=1e-5)
        assert_each_close(got.mean[s], mean, rtol=1e-4, atol=1e-5)
        assert_each_close(got.var[s], var, rtol=1e-4, atol=1e-5)
