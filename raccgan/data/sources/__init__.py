"""Data sets by name, folders and lists: which image is what."""
