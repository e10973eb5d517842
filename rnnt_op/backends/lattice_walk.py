"""How a block of ``lattice.cu`` walks the lattice of a sample; the top of that file says why."""

from __future__ import annotations

from dataclasses import dataclass

from rnnt_op.topology import Topology

WARP = 32
TURN = 16
"""Steps between two barriers. Longer turns keep each warp further behind the one before it."""


def max_threads(topology: Topology) -> int:
    """Of a block: scores and probabilities of all arcs of a node stand in registers."""
    return 512 if len(topology.arcs) <= 4 else 256


def history(topology: Topology) -> tuple[int, int]:
    """Rows that a thread keeps of its state, and of the state before it, for arcs of more than one
    frame."""

    def longest(labels: int) -> int:
        frames = max((arc.frames for arc in topology.arcs if arc.labels == labels), default=0)
        return frames if frames > 1 else 0

    return longest(0), longest(1)


@dataclass(frozen=True)
class Walk:
    """Of a lattice with ``frames`` T and ``states`` U + 1, in one direction."""

    topology: Topology
    frames: int
    states: int

    @property
    def threads(self) -> int:
        """One a state, as far as they go."""
        return min(max_threads(self.topology), -(-self.states // WARP) * WARP)

    @property
    def turns(self) -> int:
        """From the first state's first row to the last one's last; a barrier each."""
        groups, warps = -(-self.states // WARP), self.threads // WARP
        rounds, rest = divmod(groups - 1, warps)
        return rounds * max(self._turns_of_group, warps * _LAG) + rest * _LAG + self._turns_of_group

    @property
    def bytes(self) -> int:
        """Of the block's memory: the likelihood, a column of each warp, the threads' histories."""
        is_whole = self.states > self.threads
        kept_turns = self._turns_of_group + WARP // TURN if is_whole else 2
        columns = self.threads // WARP * kept_turns * TURN
        return 16 * (1 + columns + self.threads * sum(history(self.topology)))

    @property
    def _turns_of_group(self) -> int:
        return -(-(self.frames + 1 + WARP) // TURN)


_LAG = WARP // TURN + 1  # turns that a warp is behind the one before it
