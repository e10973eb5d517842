"""One line for each step of run-time compilation, for those who ask."""

from __future__ import annotations

import logging

from rnnt_op.jit import environment

_logger = logging.getLogger("rnnt_op.jit")


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
