"""Workers as the elements of a SLURM job array, by submitit.

An element is a worker, not a checkpoint: it sets the probe up once, and is requeued at its time limit. What is measured
is told by the run's folder, since submitit's states need an accounting database that many clusters lack.
"""

import getpass
import hashlib
import os
import signal
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from phasewatch.monitor.errors import PhasewatchError, requires, say
from phasewatch.monitor.files import leads_out, write_atomically
from phasewatch.monitor.runs.executor import Executor, Order
from phasewatch.monitor.runs.fan_out import FanOut, run_of
from phasewatch.monitor.runs.work import packed_work, work_packed

MOST_ELEMENTS = 500
"""Elements of one array; more workers take several. SLURM refuses arrays beyond its MaxArraySize, by default 1001."""

COMMAND_SECONDS = 60.0
"""Seconds that squeue and scancel may take, as while the controller restarts."""


def executor(order: Order) -> Executor:
    """Workers on the SLURM cluster of this machine.

    Args:
        order: what it is made for. Its options are those of `submitit.SlurmExecutor`, any other of sbatch, and
            `folder`, where submitit keeps what it sends and what the workers print: one of the user's own, that all
            nodes see.

    Raises:
        PhasewatchError: if there is no SLURM, or an option or the folder can't be used.
    """
    return FanOut(order, Slurm(order))


class Slurm:
    """Starts workers by sbatch, and counts and ends them by the name of their jobs.

    Args:
        order: what they are for.
    """

    def __init__(self, order: Order) -> None:
        with requires(f"replay(on={order.place!r})"):
            import submitit
        options = dict(order.options)
        run = run_of(order).resolve()
        self._name = f"phasewatch-{hashlib.sha256(os.fsencode(run)).hexdigest()[:12]}"
        given = options.pop("folder", None)
        self._folder = _private(Path(given) if given else Path.home() / ".cache" / "phasewatch" / self._name, run)
        self.where = f"in {self._folder}"
        self._order = order
        self._is_sent = False
        try:
            self._submitit = submitit.SlurmExecutor(self._folder)
            self._submitit.update_parameters(**_parameters(options, self._name))
        except RuntimeError as error:
            raise PhasewatchError(
                f"replay(on={order.place!r}) finds no srun here; start it on a machine of the cluster."
            ) from error
        except (TypeError, ValueError) as error:
            raise PhasewatchError(f"replay(on={order.place!r}, options={order.options!r}): {error}") from error

    def start(self, count: int) -> None:
        """Submit so many workers.

        Raises:
            PhasewatchError: if SLURM refuses them.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        file = self._folder / "worker.pkl"
        if not self._is_sent:
            write_atomically(file, packed_work(self._order))
            self._is_sent = True
        for first in range(0, count, MOST_ELEMENTS):
            workers = [_Worker(str(file)) for _ in range(min(MOST_ELEMENTS, count - first))]
            try:
                self._submitit.submit_array(workers)
            except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as error:
                raise PhasewatchError(f"SLURM takes no workers: {' '.join(str(error).split())}") from error

    def count(self) -> int | None:
        """The workers of this run in the queue or at work; None while squeue doesn't answer."""
        said = self._ask("squeue", "--noheader", "--array", "--format=%t", f"--user={getpass.getuser()}")
        return None if said is None else sum(state.strip() not in {"", "CG"} for state in said.splitlines())

    def stop(self) -> None:
        """Cancel the workers of this run, those that wait included."""
        if self._ask("scancel", f"--user={getpass.getuser()}") is None:
            say(f"scancel --name={self._name} failed; the workers end by themselves when nothing is left to measure")

    def _ask(self, *command: str) -> str | None:
        try:
            done = subprocess.run(
                [*command, f"--name={self._name}"],
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout if done.returncode == 0 else None


class _Worker:
    """What submitit sends: the name of the file with the rest."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __call__(self) -> int:
        # submitit ignores SIGTERM, so that a cancelled worker would go on until it is killed.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, _again)
        return work_packed(Path(self._file).read_bytes())


def _again(number: int, frame: FrameType | None) -> None:
    """Before the time limit: have SLURM start this element again, and end. What was measured is in the run's folder."""
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], timeout=COMMAND_SECONDS, check=False)
    os._exit(0)


def _parameters(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The parameters of submitit: those that it doesn't know go to sbatch as they are."""
    from submitit import SlurmExecutor

    known = SlurmExecutor._valid_parameters()
    own = {key: value for key, value in options.items() if key in known}
    other = {key.replace("_", "-"): value for key, value in options.items() if key not in known}
    # Without a time, submitit would ask for five minutes.
    return {"time": None, "additional_parameters": other, **own, "job_name": name}


def _private(folder: Path, run: Path) -> Path:
    """A folder that nobody else can write to, and that isn't part of a run: workers unpickle what lies there.

    Raises:
        PhasewatchError: if it is none.
    """
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        raise PhasewatchError(f"--slurm folder={folder} can't be made ({error.strerror or error}).") from error
    if not leads_out(folder, run):
        raise PhasewatchError(
            f"--slurm folder={folder} lies in the run's folder, where nothing is trusted; choose another."
        )
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PhasewatchError(
            f"--slurm folder={folder} can be used by others, and workers run what lies there. chmod 700 it, or choose "
            "another."
        )
    return folder
