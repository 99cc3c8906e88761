"""Whether a GPU can run the compiled kernels, judged from what it, its driver and the library say."""

from __future__ import annotations

import pytest
import torch

from raccgan.kernels import dispatch, library, probe


@pytest.mark.parametrize(
    ("capability", "driver", "refused", "note"),
    [
        ((9, 0), 13000, "", ""),
        ((9, 0), 13020, "", ""),
        ((8, 6), 13000, "", ""),  # code for 8.0 runs on 8.6
        ((9, 0), 0, "", ""),  # a driver that does not say
        ((7, 5), 13000, "compiled for 8.0, 9.0 and later, not for 7.5", ""),
        ((9, 0), 12080, "the driver serves CUDA 12.8, and the kernels were compiled by CUDA 13.2", ""),
        ((12, 0), 13000, "the driver serves CUDA 13.0, and the kernels were compiled by CUDA 13.2", ""),  # PTX
        ((12, 0), 13020, "", "no machine code for compute capability 12.0"),
    ],
)
def test_what_a_gpu_can_run(capability: tuple[int, int], driver: int, refused: str, note: str) -> None:
    for found, wanted in zip(probe.judge(capability, "80, 90", "13.2", driver), (refused, note), strict=True):
        assert bool(found) == bool(wanted)
        assert wanted in str(found)


def test_a_refusal_reaches_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MISSING", None)
    monkeypatch.setattr(dispatch, "_CUDA", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    build = {"cuda": "13.0", "cuda_architectures": "80, 90"}
    monkeypatch.setattr(library, "build", lambda: build)
    call = dispatch.Call(torch.device("cuda"), torch.float16)
    for has_stream, why in ((False, f"has no {probe.STREAM}"), (True, "not for 7.5")):
        monkeypatch.setattr(probe, "_has_stream", lambda found=has_stream: found)
        probe._asked.cache_clear()
        assert why in str(dispatch.compiled(call, "x"))
    probe._asked.cache_clear()
