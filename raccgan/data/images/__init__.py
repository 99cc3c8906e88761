"""Image files to arrays: opening, decoding, geometry."""
