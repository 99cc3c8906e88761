"""Outputs for a person or another program: files, pictures, the report, and lines on the terminal."""
