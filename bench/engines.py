"""Who else serves a model that was exported to ONNX: ONNX Runtime and OpenVINO, on a CPU.

Both come with ``pip install -e '.[test]'``. Whatever is missing or refused raises, and becomes the row that says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Engine = Callable[..., Tensor]  # of the module's own arguments


def onnx(module: nn.Module, *arguments: Tensor) -> bytes:
    """The module as an ONNX file, for arguments of these shapes."""
    names = [f"argument{i}" for i in range(len(arguments))]
    with torch.no_grad():
        program = torch.onnx.export(module, arguments, dynamo=True, input_names=names, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnx_runtime(model: bytes, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*arguments: Tensor) -> Tensor:
        (output,) = session.run(None, dict(zip(names, (a.numpy() for a in arguments), strict=True)))
        return torch.from_numpy(output)

    return run


def openvino(model: bytes, threads: int, dtype: torch.dtype) -> Engine:
    """OpenVINO, told to compute in ``dtype``; inputs and outputs stay what they are in the model.

    Raises:
        RuntimeError: it computes in another dtype on this processor.
    """
    import openvino

    wanted = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}[dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": wanted,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    if compiled.get_property("INFERENCE_PRECISION_HINT") != wanted:
        raise RuntimeError(f"OpenVINO does not compute in {dtype} on this processor")

    def run(*arguments: Tensor) -> Tensor:
        outputs = compiled([a.numpy() for a in arguments], share_inputs=True)
        return torch.from_numpy(outputs[0])

    return run
