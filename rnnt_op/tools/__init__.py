"""What measures and describes the loss: the ``rnnt-op`` command, and the studies that it runs."""
