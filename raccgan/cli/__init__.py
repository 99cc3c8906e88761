"""Code of the commands: their options, their errors as one line each, and their memory."""
