"""Anomaly scores: of tensors, of images in any form, of folders of files."""
