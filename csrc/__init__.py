"""Kernel sources, compiled at run time; installed as ``rnnt_op.csrc`` so that a wheel carries them.

No kernel lives here yet: this release computes with torch operations (``rnnt_op/backends``).
"""
