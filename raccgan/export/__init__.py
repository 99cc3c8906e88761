"""One file with the whole scorer, for ONNX Runtime, OpenVINO or torch.export."""
