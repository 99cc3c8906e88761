"""The whole scorer as one file for ONNX Runtime, OpenVINO or torch.export."""
