"""The monitor that a plain training loop calls once per step."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from torch import nn

from phasewatch.callbacks.trainers.arguments import check_call, check_probe, checked_options, shown, whole_step
from phasewatch.callbacks.trainers.ranks import RankError, Ranks
from phasewatch.callbacks.trainers.schedule import Schedule
from phasewatch.callbacks.trainers.session import Options, Session
from phasewatch.monitor.errors import PhasewatchError, in_words, say, warn
from phasewatch.monitor.probing.attributes import ChangedNumbers
from phasewatch.monitor.probing.probe import Probe
from phasewatch.monitor.runs.sink import Sink
from phasewatch.monitor.snapshots.averaging import RunningAverage
from phasewatch.monitor.snapshots.repeats import Repeats
from phasewatch.monitor.snapshots.sharded import gathered, is_sharded
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.trajectories.trajectory import Trajectory

LONGEST_JUMP = 100_000
"""Steps between two calls in which a schedule is asked for each step that was left out. Asking takes about 10 ms for as
many; a longer jump, such as to a checkpoint, is taken as it is."""


class PhaseMonitor:
    """Watches a training run: one call per step, `monitor(step)`.

    Training with it is bit-identical to training without it. After construction it raises nothing: what goes wrong is
    a warning. A run folder that holds points already is resumed: what it lacks is measured, and a step it holds is
    not measured again.

    In a distributed training, make it and call it on every rank, with the same `run` and `at`. Rank 0 measures and
    writes, and the others wait where `measure` is "inline". Weights that are sharded (FSDP, tensor parallelism, ZeRO
    3) are gathered to the memory of rank 0 where a snapshot is due. For DDP it may also be made on rank 0 alone, which
    then measures in the background.

    Args:
        model: the model in training, as it is or in its wrapper.
        probe: measures its snapshots. In a distributed training it is used on rank 0 alone, and may be None elsewhere.
        run: the run's folder; made if it isn't there.
        at: which steps: `every(100)`, `log_spaced(1, 50_000, num=80)`, `Budget(0.1, at=...)`, or any `step -> bool`. A
            due step that the counter jumps over, or that lies before the first call, is measured at the next call.
        sinks: told of each point and each transition; each in a thread of its own.
        measure: "inline" measures before the call returns. "background" measures in another process, so that the loop
            pays for copying the snapshot alone; the probe must have been made with a function that builds its model.
        keep_snapshots: keep each snapshot's file after it is measured, so that it can be measured again.
        average: measure the mean of the weights over about this share of the steps so far, such as 0.02, in place of
            the weights of one step, whose noise hides what λ̂ does late in training. The snapshots are then of the
            averaged parameters with the model's buffers as they are (batch norm's statistics are not those of the
            averaged weights), and loss, λ̂ and metrics of a point are all theirs; training's own loss isn't in it.
            λ̂ is seen to move later by about that share of the step. It costs a copy of the parameters on their device
            and a pass over them in each call, so call it at each step. The average is kept in memory alone: a run
            killed and begun anew from its seed repeats it bit for bit; one that goes on from a checkpoint begins
            another there, in which that first step weighs (that step / step)^(1/average), 5 % when three times that
            share of the steps have passed. To watch an average that training keeps itself, give that model instead.
        sampler: "calibrate" finds the setting on the run's own snapshots, which wait until then: on the first, the
            middle and the last of the first 3, or of 6 or 12 where none works for fewer. Of the probe's
            sampler, its class, the batch size and the momentum are kept. What comes out is kept in the run's folder,
            for a resumed run and a replay with the same probe; where nothing works, the probe's own sampler is used,
            with steps by curvature, κ = 0.5, if it says nothing of steps.
        calibrate_at: the step to calibrate at, or the first snapshot after it, in place of the first snapshots.

    Raises:
        PhasewatchError: for what can't work, before the first step. On all ranks, if they have different folders and
            the weights are sharded; else that is a `RankError` of the first call.

    Example:
        >>> import tempfile, torch
        >>> from phasewatch import SGLD, PhaseMonitor, Probe, every
        >>> _ = torch.manual_seed(0)
        >>> model, data = torch.nn.Linear(2, 1), torch.randn(64, 2)
        >>> def loss(model, batch):
        ...     return model(batch).square().mean()
        >>> sampler = SGLD(step_size=1e-3, nbeta=10.0, chains=2, draws=10, burn_in=5, batch_size=16)
        >>> probe = Probe(model, loss, data, sampler=sampler)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with PhaseMonitor(model, probe, run=tempfile.mkdtemp(), at=every(2)) as monitor:
        ...     for step in range(1, 5):
        ...         optimizer.zero_grad()
        ...         loss(model, data).backward()
        ...         optimizer.step()
        ...         _ = monitor(step)
        >>> monitor.trajectory.steps.tolist()
        [2, 4]
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe | None,
        *,
        run: str | Path,
        at: Schedule,
        sinks: Sequence[Sink] = (),
        measure: Literal["inline", "background"] = "inline",
        keep_snapshots: bool = True,
        average: float | None = None,
        sampler: Literal["calibrate"] | None = None,
        calibrate_at: int | None = None,
    ) -> None:
        check_call(model, run, at, measure)
        options = checked_options(at, sinks, measure, keep_snapshots, average, sampler, calibrate_at)
        self._sharded = is_sharded(model)
        self._ranks = Ranks.of_training(run, together=self._sharded)
        self._path = Path(run)
        self._session: Session | None = None
        self._model = model
        self._at = at
        self._average: RunningAverage | None = None
        self._numbers: ChangedNumbers | None = None
        self._repeats: Repeats | None = None
        self._first_step: int | None = None
        self._last_step: int | None = None
        self._jumped_over: list[int] = []
        self._taken: set[int] = set()
        self._handled: set[int] = set()
        self._warned: set[str] = set()
        self._closed = False
        self._interrupted = False
        self._start(run, probe, options)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self._session.folder.path if self._session else self._path

    @property
    def trajectory(self) -> Trajectory:
        """The points measured so far; none on another rank than 0."""
        return Trajectory(self._session.folder.points[:] if self._session else ())

    def __call__(self, step: int) -> bool:
        """Take a snapshot if one is due, and measure it or send it to be measured.

        Args:
            step: the training step that the model is at; an integer of any library.

        Returns:
            Whether a snapshot was taken.

        Raises:
            RankError: if the ranks of a distributed training disagree about the run, or one of them is lost.
        """
        if self._closed:
            self._warn_once(
                "close", f"monitor({shown(step)}) came after monitor.close(): nothing is measured any more."
            )
            return False
        try:
            return self._observe(whole_step(step))
        except RankError:
            raise
        except Exception as error:
            kind = str(error) if isinstance(error, PhasewatchError) else type(error).__name__
            self._warn_once(kind, f"monitor({shown(step)}) failed, and training goes on: {in_words(error)}")
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close(measure_rest=error is None)

    def close(self, *, measure_rest: bool = True) -> None:
        """Measure what still waits, tell the sinks that this is the end, and write the report.

        Args:
            measure_rest: False leaves what still waits to a resumed run or a replay, as does a process that ends
                without this call.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._interrupted:
                self._say_how_to_go_on()
            if self._session is None:
                self._leave(measure_rest)
                return
            with self._ranks.closing() if self._ranks else nullcontext():
                self._finish(self._session, measure_rest)
        except KeyboardInterrupt:
            self._say_how_to_go_on()
            raise
        except Exception as error:
            warn(f"monitor.close() failed, and training goes on: {in_words(error)}")
        finally:
            if self._session:
                self._session.stop()

    def _start(self, run: str | Path, probe: Probe | None, options: Options) -> None:
        """Make what rank 0 measures and writes with, and tell the other ranks."""
        ranks = self._ranks
        try:
            if ranks is None or ranks.is_first:
                check_probe(self._model, probe, options.average)
                assert probe
                self._session = Session(run, probe, options)
                self._average = None if options.average is None else RunningAverage(options.average)
                self._numbers = ChangedNumbers(probe.subject)
                # A probe that measures here sees for itself.
                self._repeats = Repeats() if options.background else None
        except PhasewatchError as error:
            if ranks:
                ranks.announce(set(), str(error))
            raise
        try:
            if ranks:
                ranks.announce(self._session.recorded if self._session else set())
        except PhasewatchError:
            if self._session:
                self._session.stop()
            raise

    def _observe(self, step: int) -> bool:
        if self._first_step is None:
            self._first_step = step
            if self._ranks:
                self._ranks.meet()
        if self._average:
            self._average.update(self._model, step)
        if not self._is_due(step):
            return False
        if step in self._handled:
            return False
        self._handled.add(step)
        snapshot = self._gathered(step) if self._sharded else None
        if self._ranks is None:
            return self._take(step, snapshot)
        if self._session is None:
            self._ranks.wait(step)
            return True
        with self._ranks.at_work(step):
            return self._take(step, snapshot)

    def _gathered(self, step: int) -> Snapshot | None:
        """The weights of all ranks, on rank 0; a group of one process shards them too."""
        try:
            return gathered(self._model, step)
        except PhasewatchError as error:
            if self._ranks is None:
                raise
            raise RankError(str(error)) from error

    def _take(self, step: int, snapshot: Snapshot | None) -> bool:
        """Have a snapshot of this step measured, unless there is one; it is taken here if it wasn't gathered."""
        session = self._session
        assert session
        assert self._numbers
        self._numbers.note(step, elsewhere=session.in_background)
        if step in self._taken:
            return False
        if snapshot is None:
            snapshot = (self._average.snapshot if self._average else Snapshot.of)(self._model, step)
        if not session.has_begun:
            if self._ranks and self._ranks.is_alone:
                session.let_no_rank_wait()
            self._taken = session.begin(snapshot, self._first_step)
            for left, numbers in session.numbers_of_waiting.items():
                if left < step:
                    self._numbers.recall(left, numbers)
            if step in self._taken:
                return False
        self._taken.add(step)
        numbers = {} if self._sharded else self._numbers.see(self._model)
        if self._repeats:
            self._repeats.see(snapshot)
        session.take(snapshot, numbers)
        return True

    def _is_due(self, step: int) -> bool:
        """Whether a snapshot is due at this step, or was at one since the last call, or before the first one."""
        last, self._last_step = self._last_step, step
        due = bool(self._at(step))
        if last is None:  # the first call, perhaps of a run that goes on
            recorded = self._ranks.recorded if self._ranks else self._session.recorded if self._session else ()
            last = max((known for known in recorded if known <= step), default=0)
        if not 1 < step - last <= LONGEST_JUMP:
            return due
        jumped = [passed for passed in range(last + 1, step) if self._at(passed)]
        self._jumped_over += jumped
        return due or bool(jumped)

    def _leave(self, measure_rest: bool) -> None:
        """On another rank than 0: go when rank 0 has measured what still waits."""
        assert self._ranks
        try:
            if measure_rest:
                self._ranks.wait_for_closing()
        finally:
            self._ranks.leave()

    def _finish(self, session: Session, measure_rest: bool) -> None:
        if self._first_step is not None and not session.has_begun:
            count = len(session.folder.points)
            older = f" The {count} points in {self.run} are older." if count else ""
            never = f"never fired from step {self._first_step} on; nothing was measured"
            warn(f"PhaseMonitor(at={self._at!r}) {never}.{older}")
        if count := len(self._jumped_over):
            some = ", ".join(map(str, self._jumped_over[:3])) + (f" and {count - 3} more" if count > 3 else "")
            warn(
                f"PhaseMonitor(at={self._at!r}) was due at steps that the counter jumped over ({some}). A snapshot was "
                "taken at the next call instead, one for all that lay between two calls."
            )
        session.finish(measure_rest=measure_rest, report=not self._interrupted)

    def _say_how_to_go_on(self) -> None:
        say(f"stopped; what {self.run} lacks is measured when the run is resumed, or by a replay of it")

    def _warn_once(self, kind: str, message: str) -> None:
        """Warn the first time: what fails at one step of a night fails at a million."""
        if kind not in self._warned:
            self._warned.add(kind)
            warn(message)
