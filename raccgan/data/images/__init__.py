"""Image files as arrays: opening, decoding, geometry."""
