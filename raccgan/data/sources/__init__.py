"""Data sets by name, folders and lists: each lists images with their classes."""
