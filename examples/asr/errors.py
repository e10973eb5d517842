"""The error a user can act on."""


class ExampleError(Exception):
    """Wrong options or data: shown as one line, exit status 2."""
