"""Runs the project's CUDA kernel sources on a CPU, so that machines without a GPU test them.

``EmulatedModule`` compiles a source with g++ and launches its kernels on CPU tensors: one fiber for
each CUDA thread, so barriers and warp collectives work, and what goes wrong is told as an
``EmulatorError``: accesses beyond ``guarded`` memory, misaligned vectors, deadlocks, collectives
that do not fit. ``thread_order`` changes who runs first, which a right kernel does not notice. A
``watched`` module also tells races, whether or not they did harm.

Not emulated: the memory model (what one thread writes others see at once, in one order), lockstep
of a warp, blocks at the same time (they run one after another), speed.
"""

from emulator.build import EmulatorError
from emulator.memory import guarded
from emulator.module import EmulatedModule, thread_order

__all__ = ["EmulatedModule", "EmulatorError", "guarded", "thread_order"]
