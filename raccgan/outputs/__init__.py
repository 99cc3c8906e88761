"""What a person or another program reads: files, pictures, the report, and lines on the terminal."""
