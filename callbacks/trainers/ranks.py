"""The processes of a distributed training: every rank calls its monitor, and rank 0 measures and writes.

While rank 0 measures, the others wait in their monitors, by asking the key-value store of the process group. A waiting
collective would end the training at the process group's timeout.
"""

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from phasewatch.monitor.errors import PhasewatchError, in_words

MEET_SECONDS = 30.0
"""Seconds that a rank waits at its first call for rank 0 to have made its monitor. Gradients are exchanged before that
call, so rank 0 has made it, unless it makes none."""

BEAT_SECONDS = 1.0
"""Seconds between two signs of life of rank 0 while it measures."""

DEAD_SECONDS = 60.0
"""Seconds without a sign of life after which the other ranks stop waiting for rank 0."""

POLL_SECONDS = 0.02
"""Seconds between two questions whether rank 0 is done; a question takes about 0.1 ms."""

LEAVE_SECONDS = 5.0
"""Seconds that rank 0, which often keeps the store, stays at the end for the others to have heard that it is done."""

_PREPARED = "prepared"
_CLOSED = "closed"
_NUMBERS = itertools.count()


class RankError(PhasewatchError):
    """The processes of a training can't go on together; it is raised out of the training loop."""


class Ranks:
    """One rank's view of the others.

    Args:
        run: the run's folder, as this rank was told.
        together: every rank makes its monitor now, so that they can compare at once what they were told.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self, run: str | Path, *, together: bool) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._run = os.path.abspath(run)
        self._together = together
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore(f"phasewatch-{next(_NUMBERS)}", store)
        self._recorded: set[int] = set()
        self._has_met = False

    @classmethod
    def of_training(cls, run: str | Path, *, together: bool) -> "Ranks | None":
        """The ranks of the training that this process is a part of; None if it has one process."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
            return None
        return cls(run, together=together)

    @property
    def is_first(self) -> bool:
        """Whether this rank measures and writes."""
        return self.rank == 0

    @property
    def recorded(self) -> set[int]:
        """The steps that the run held as it began, as rank 0 told."""
        return self._recorded

    def announce(self, recorded: set[int], failure: str = "") -> None:
        """Tell the other ranks what this one has; where all make their monitors together, hear what they have.

        Args:
            recorded: the steps that the run holds already, on rank 0.
            failure: why rank 0 has no monitor.

        Raises:
            RankError: if the ranks disagree, or rank 0 has failed.
        """
        mine = {"run": self._run, "recorded": sorted(recorded), "failure": failure}
        self._store.set(f"rank {self.rank}", json.dumps(mine))
        if self._together:
            self._has_met = True
            found: list[Any] = [None] * self.size
            dist.all_gather_object(found, mine)
            self._compare(dict(enumerate(found)))

    def meet(self) -> None:
        """At the first call: see that every rank with a monitor has the same folder, and that rank 0 has one.

        Raises:
            RankError: if not.
        """
        if self._has_met:
            return
        self._has_met = True
        if not self.is_first:
            try:
                self._store.wait(["rank 0"], timedelta(seconds=MEET_SECONDS))
            except Exception as error:
                raise RankError(
                    f"PhaseMonitor(...) was made on rank {self.rank} and not on rank 0, which measures and writes. "
                    f"Make it on every rank, or on rank 0 alone. ({in_words(error)[:200]})"
                ) from error
        self._compare({rank: json.loads(self._store.get(f"rank {rank}")) for rank in self._there()})

    @property
    def is_alone(self) -> bool:
        """Whether no other rank has made a monitor, so that none waits in one while this one measures."""
        return self._there() == [self.rank]

    @contextmanager
    def at_work(self, step: int | str) -> Iterator[None]:
        """What rank 0 does inside, the others wait for.

        Args:
            step: the training step.
        """
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_SECONDS):
                try:
                    self._store.add("beat", 1)
                except Exception:  # the others are gone
                    return

        thread = threading.Thread(target=beat, name="phasewatch-beat", daemon=True)
        thread.start()
        failure = ""
        try:
            yield
        except Exception as error:
            failure = in_words(error)
            raise
        finally:
            ended.set()
            thread.join()
            with suppress(Exception):  # the others are gone, and what is written stays
                self._store.set(f"done {step}", failure)

    def wait(self, step: int | str) -> None:
        """Wait until rank 0 is done.

        Args:
            step: the training step.

        Raises:
            RankError: if rank 0 has ended, or hangs.
        """
        beat, since = -1, time.monotonic()
        while True:
            try:
                if self._store.check([f"done {step}"]):
                    return
                now = self._store.add("beat", 0)
            except Exception as error:
                raise self._lost(step, in_words(error)) from error
            if now != beat:
                beat, since = now, time.monotonic()
            elif time.monotonic() - since > DEAD_SECONDS:
                raise self._lost(step, f"no sign of life for {DEAD_SECONDS:g} seconds")
            time.sleep(POLL_SECONDS)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """What rank 0 makes its monitor of inside, the others wait for; where it fails, they hear why."""
        try:
            with self.at_work(_PREPARED):
                yield
        except Exception:
            with suppress(Exception):  # the others are gone
                self._stay(self.size - 1)
            raise

    def wait_for_preparation(self) -> None:
        """Wait until rank 0 has what it makes its monitor of.

        Raises:
            RankError: if it can't have it, or has ended, or hangs.
        """
        self.wait(_PREPARED)
        failure = self._store.get(f"done {_PREPARED}").decode()
        self.leave()
        if failure:
            raise RankError(f"Rank 0 has no monitor: {failure}")

    @contextmanager
    def closing(self) -> Iterator[None]:
        """What rank 0 does inside, the others wait for; then it waits for them to have heard of it."""
        with self.at_work(_CLOSED):
            yield
        with suppress(Exception):  # the others are gone
            self._stay(len(self._there()) - 1)

    def wait_for_closing(self) -> None:
        """Wait until rank 0 has closed the run.

        Raises:
            RankError: if rank 0 has ended, or hangs.
        """
        self.wait(_CLOSED)

    def leave(self) -> None:
        """Tell rank 0 that this one doesn't ask any more."""
        with suppress(Exception):  # rank 0 is gone
            self._store.add("left", 1)

    def _stay(self, others: int) -> None:
        """Stay until so many ranks have left, or for long enough."""
        end = time.monotonic() + LEAVE_SECONDS
        while self._store.add("left", 0) < others and time.monotonic() < end:
            time.sleep(POLL_SECONDS)

    def _lost(self, step: int | str, why: str) -> RankError:
        if step == _PREPARED:
            return RankError(
                f"Rank {self.rank} waited while rank 0 makes its monitor, and rank 0 has ended, hangs, or makes none "
                f"({why}). Give the callback on every rank."
            )
        what = "closes the run" if step == _CLOSED else f"measures step {step}"
        return RankError(
            f"Rank {self.rank} waited while rank 0 {what}, and rank 0 has ended, hangs, or isn't at that step ({why}). "
            f"What was measured is in {self._run}, and the training goes on from its last checkpoint. Every rank must "
            "give its monitor the same run= and at=, and call it with the same steps."
        )

    def _there(self) -> list[int]:
        """The ranks that have made a monitor."""
        return [rank for rank in range(self.size) if self._store.check([f"rank {rank}"])]

    def _compare(self, found: dict[int, dict[str, Any]]) -> None:
        """Learn what rank 0 has, and refuse different folders."""
        runs = {rank: of["run"] for rank, of in found.items()}
        if len(set(runs.values())) > 1:
            other = next(rank for rank in sorted(runs) if runs[rank] != runs[min(runs)])
            raise RankError(
                f"PhaseMonitor(run=...) differs between the ranks of this training: {runs[min(runs)]!r} on rank "
                f"{min(runs)} and {runs[other]!r} on rank {other}. Give all ranks the same folder. A name with a time "
                "or a random part in it is made on rank 0 and broadcast."
            )
        first = found.get(0, {"failure": "", "recorded": ()})
        if first["failure"] and not self.is_first:
            raise RankError(f"Rank 0 has no monitor: {first['failure']}")
        self._recorded = set(first["recorded"])
