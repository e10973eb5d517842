"""What run-time compilation says: a line for each step to those who ask, one to all who wait."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rnnt_op.jit import environment

PATIENCE = 2.0
"""Seconds that nobody needs to be told about."""

_logger = logging.getLogger("rnnt_op.jit")
_announcements = itertools.count()


def report(message: str, *arguments: object) -> None:
    """Logs at INFO if ``RNNT_OP_JIT_VERBOSE`` is set, to stderr unless logging is configured.

    Otherwise logs at DEBUG, for applications that collect that.
    """
    if not environment.is_verbose():
        _logger.debug(message, *arguments)
        return
    if not _logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _logger.addHandler(handler)
    if not _logger.isEnabledFor(logging.INFO):
        _logger.setLevel(logging.INFO)
    _logger.info(message, *arguments)


@contextmanager
def announced(kernels: int) -> Iterator[None]:
    """Says once in a process, on stderr, what is waited for, if it takes more than ``PATIENCE``."""

    def announce() -> None:
        if next(_announcements) == 0:
            print(
                f"rnnt_op: compiling {kernels} kernels for this machine, which rnnt-op precompile "
                "does beforehand",
                file=sys.stderr,
                flush=True,
            )

    timer = threading.Timer(PATIENCE, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
