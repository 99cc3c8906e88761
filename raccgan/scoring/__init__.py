"""Anomaly scores of tensors, of images in any form, and of folders of files."""
