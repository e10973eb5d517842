"""How far a run bounded by steps, by minutes or by both has come."""

import math
import time
from collections.abc import Callable


class Budget:
    """Progress from 0 to 1 towards whichever bound is nearer.

    steps:   Number of steps; None is unbounded.
    seconds: Wall-clock seconds from construction; None is unbounded.
    agree:   Makes the fraction of time spent the same in all processes, which must not part.
    """

    def __init__(
        self,
        steps: int | None,
        seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
        agree: Callable[[float], float] = float,
    ) -> None:
        self.steps = steps
        self.seconds = seconds
        # Kept free for the last evaluation, which belongs to the budget too.
        self.reserved_seconds = 0.0
        # Spent before construction, by the run that this one resumes.
        self.earlier_seconds = 0.0
        self._agree = agree
        self._clock = clock
        self._start = clock()

    @property
    def elapsed(self) -> float:
        """Seconds spent so far."""
        return self.earlier_seconds + self._clock() - self._start

    def progress(self, step: int) -> float:
        """Fraction of the budget spent after `step` steps, at most 1."""
        fractions = [0.0]
        if self.steps is not None:
            fractions.append(step / self.steps)
        if self.seconds is not None:
            available = max(self.seconds - self.reserved_seconds, 1e-9)
            fractions.append(self._agree(self.elapsed / available))
        return min(1.0, max(fractions))


def learning_rate(peak: float, step: int, warmup_steps: int, progress: float) -> float:
    """Linear warm-up over steps times a cosine to zero over the budget's progress."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    return peak * warmup * 0.5 * (1.0 + math.cos(math.pi * progress))
