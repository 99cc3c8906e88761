"""New images of a class, and how near they come to real ones."""
