"""Kernel sources, compiled at run time; a wheel installs them as ``rnnt_op.csrc``."""
