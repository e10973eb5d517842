"""Processes that run the same function together, as the ranks of a process group on CPUs.

They serve until one of them fails: what is left of a collective cannot be trusted, so the next
call starts new ones. Importing torch costs seconds, so one process does it and forks them all.
"""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 300
"""How long a call may take, compilation included, before its ranks count as hanging."""

_forkserver = torch.multiprocessing.get_context("forkserver")
# What ranks use besides, as far as no thread starts and no test's file is needed.
_forkserver.set_forkserver_preload(["rnnt_op", "torch._dynamo", "torch.distributed.fsdp"])


class Ranks:
    """Processes of a gloo process group, joined through a file in ``directory``."""

    def __init__(self, directory: Path, size: int = 2) -> None:
        self.size = size
        self._directory = directory
        self._started = 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returns on each rank.

        Raises:
            AssertionError: a rank raised an error, which is its text, ended, or hangs.
        """
        if not self._processes:
            self._start()
        request = pickle.dumps((function, arguments))
        for connection in self._connections:
            connection.send_bytes(request)
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + SECONDS
        while len(answers) < self.size:
            waiting = [c for rank, c in enumerate(self._connections) if rank not in answers]
            ready = wait(waiting, max(0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"no answer within {SECONDS} s, but from ranks {sorted(answers)}")
            for connection in ready:
                rank = self._connections.index(connection)
                try:
                    answers[rank], error = pickle.loads(connection.recv_bytes())
                except EOFError:
                    error = "the process ended"
                if error is not None:
                    self._fail(f"rank {rank}: {error}")
        return [answers[rank] for rank in range(self.size)]

    def stop(self) -> None:
        """Ends the processes, whatever they do."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            connection.close()
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        self._started += 1
        store = self._directory / f"store{self._started}"
        for rank in range(self.size):
            ours, theirs = _forkserver.Pipe()
            process = _forkserver.Process(
                target=_serve, args=(rank, self.size, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _fail(self, message: str) -> None:
        self.stop()
        raise AssertionError(message)


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    while True:
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            answer = function(*arguments), None
        except Exception:
            answer = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
