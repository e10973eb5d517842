"""The only place that talks to ``torch.library``: importing it registers the ``rnnt_op`` namespace.

``schemas`` defines the ops, ``kernels`` hands them to the engine, ``fakes`` gives their shapes to
tracers, and ``autograd`` hands each to a function that differentiates it, or refuses to.
``library`` holds the handle that must stay alive.
"""

from . import autograd, fakes, kernels, schemas

__all__ = ["autograd", "fakes", "kernels", "schemas"]
