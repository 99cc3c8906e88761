"""Metrics, controls and the evaluation of a trained run on its test images."""
