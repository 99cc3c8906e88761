"""The exception for what a person can mend: a wrong path, an empty class, a missing backend."""


class InputError(Exception):
    """Bad input, said in one line: what is wrong, where, and what would mend it.

    The commands print it as ``error: <message>`` and exit with status 2; a traceback is for our bugs only.
    """
