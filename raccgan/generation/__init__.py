"""New images of a class, and their distance from real images."""
