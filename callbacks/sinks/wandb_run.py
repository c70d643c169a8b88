"""Which W&B run results are written to, and how it is left usable to the user."""

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from phasewatch.monitor.errors import PhasewatchError, requires, warn
from phasewatch.monitor.files import read_text
from phasewatch.monitor.runs.sink import CLOSE_SECONDS

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

HARMLESS = {"project", "entity", "mode", "disabled", "console"}
"""What a folder's `wandb/settings` may say."""

MOST_SETTINGS_BYTES = 100_000

INIT_SECONDS = 20.0
"""Seconds that W&B may take to open a run of our own before the attempt counts as failed; the next item tries again.
A slow server answers in 5."""

SERVICE_SECONDS = 1.0
"""Seconds that W&B's service has to end. A run that is finished is on disk only some milliseconds later."""


@dataclass(frozen=True)
class Choice:
    """What the user said about the run to write to; nothing is opened yet.

    Attributes:
        run: a run to write to.
        own_run: open a run of our own in any case.
        project: W&B project of a run of our own.
        name: its name.
        group: its group.
        mode: "online", "offline" or "disabled".
        close_seconds: how long W&B may upload a run of our own after it is finished.

    Raises:
        PhasewatchError: the arguments contradict each other, or `mode` is unknown.
    """

    run: "wandb.Run | None" = None
    own_run: bool = False
    project: str | None = None
    name: str | None = None
    group: str | None = None
    mode: Mode | None = None
    close_seconds: float = CLOSE_SECONDS

    def __post_init__(self) -> None:
        described = [key for key in ("own_run", "project", "name", "group", "mode") if getattr(self, key)]
        if self.run is not None and described:
            raise PhasewatchError(
                f"WandbSink(run=..., {described[0]}=...) names a run and describes another; "
                f"leave out either run or {' and '.join(described)}."
            )
        if self.run is not None and not callable(getattr(self.run, "log", None)):
            came = type(self.run).__name__
            raise PhasewatchError(f"WandbSink(run=...) must be what wandb.init() returns, not {came}.")
        if self.mode is not None and self.mode not in get_args(Mode):
            raise PhasewatchError(f"WandbSink(mode=...) must be one of {', '.join(get_args(Mode))}, not {self.mode!r}.")

    def open(self, on_finish: Callable[[], None]) -> "Opened":
        """Find the run: the one given, else `wandb.run`, else one of our own.

        Args:
            on_finish: called when the user finishes a run of theirs.

        Returns:
            The run. A sentence tells the user where the results go if that isn't what they would expect.
        """
        with requires("WandbSink()"):
            import wandb
        run = self.run
        if run is None and not self.own_run:
            run = wandb.run
        if run is not None and _is_finished(run):
            return Opened(run, ours=False, commits=False, finished=True)
        if run is not None and (run.disabled or _call_at_finish(run, on_finish)):
            # Exit handlers that are registered while the process exits aren't called any more.
            return Opened(run, ours=False, commits=run.disabled or not threading.main_thread().is_alive())
        own, remark = self._open_own(run or wandb.run)
        if run is not None:
            remark = f"WandbSink can't share the W&B run {run.id} safely, so it writes to {own.id} beside it."
        if remark:
            warn(remark)
        return Opened(own, ours=True, commits=True)

    def _open_own(self, beside: "wandb.Run | None") -> tuple["wandb.Run", str | None]:
        """A run of our own, in the project of the run `beside` it, and what the user should hear about it."""
        import wandb

        end_service_with_process()
        project, name, group, mode, entity = self.project, self.name, self.group, self.mode, None
        if beside is not None:
            project, entity, group = project or beside.project, beside.entity or None, group or beside.group or None
            name = name or (f"{beside.name}-phasewatch" if beside.name else None)
            mode = mode or next((known for known in get_args(Mode) if known == beside.settings.mode), None)
        keyless = mode is None and not has_key()
        run = wandb.init(
            project=project,
            entity=entity,
            name=name,
            group=group,
            mode="offline" if keyless else mode,
            reinit="create_new",
            settings=wandb.Settings(
                console="off", disable_git=True, init_timeout=INIT_SECONDS, finish_timeout=max(self.close_seconds, 0.1)
            ),
        )
        # W&B counts it among the runs that a later wandb.init() returns, or finishes, in place of a new one.
        forget = getattr(getattr(run, "_wl", None), "remove_active_run", None)
        if forget is not None:
            forget(run)
        if not keyless:
            return run, None
        directory = run.settings.sync_dir
        return run, (
            "WandbSink() found no W&B API key, so its run is offline, in "
            f"{directory}; `wandb sync {directory}` uploads it. Run `wandb login` first, or pass mode='offline'."
        )


def refuse_foreign_settings() -> None:
    """Refuse to go online by the `wandb/settings` of the current folder, for a command that may be started anywhere.

    W&B reads it. In a folder of somebody else's it can name the server that gets the user's key.

    Raises:
        PhasewatchError: if it is there and says more than a project, an entity and a mode.
    """
    if "WANDB_DIR" in os.environ:
        return
    file = Path("wandb", "settings")
    if not os.path.lexists(file):
        return
    names = {line.partition("=")[0].strip() for line in read_text(file, most_bytes=MOST_SETTINGS_BYTES).splitlines()}
    if foreign := sorted(name for name in names if name and name[0] not in "[#;" and name not in HARMLESS):
        raise PhasewatchError(
            f"{file} in the current folder sets {foreign[0]} for W&B, and it may be somebody else's; start the command "
            "in another folder, or say WANDB_DIR=. if it is yours."
        )


@dataclass
class Opened:
    """A run that results are written to.

    Attributes:
        run: the run.
        ours: whether it is a run of our own, which nobody else logs to or finishes.
        commits: whether we may commit rows: the user logs nothing there, or nothing more.
        finished: whether it takes nothing any more.
    """

    run: "wandb.Run"
    ours: bool
    commits: bool
    finished: bool = False


def _is_finished(run: "wandb.Run") -> bool:
    return bool(getattr(run, "_is_finished", False))


def _call_at_finish(run: "wandb.Run", on_finish: Callable[[], None]) -> bool:
    """Arrange to be called when this run finishes; False if that, or asking for its step, isn't possible."""
    try:
        from wandb.sdk.wandb_run import TeardownHook, TeardownStage

        if run.settings.mode == "shared":
            return False
        run._teardown_hooks.append(TeardownHook(on_finish, TeardownStage.EARLY))
    except (ImportError, AttributeError):
        return False
    return True


def has_key() -> bool:
    """Whether W&B can go online without asking the user, or was told not to; looks at no network."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup().settings
    return settings.mode != "online" or (
        wbauth.authenticate_session(host=settings.base_url, source="phasewatch", prompt=False, update_session=False)
        is not None
    )


def end_service_with_process() -> None:
    """Have W&B's service end with this process at once, if only runs of our own are still open in it.

    W&B waits for it as the process ends, which is minutes where a server doesn't answer, and ten seconds or more to
    send statistics about itself. A run of the user's that is open, or a service that was there before, is waited for as
    the user told W&B to.
    """
    try:
        from wandb.sdk import wandb_setup

        setup = wandb_setup.singleton()
        if setup._connection is None:
            with suppress(ImportError):  # an earlier W&B, which sends none
                from wandb.analytics.opentelemetry.opentelemetry_proxy import disable

                disable()
            connection = setup.ensure_service()
            atexit.register(_end_service, setup, connection, os.getpid())
    except (ImportError, AttributeError):
        return


def _end_service(setup: Any, connection: Any, process: int) -> None:
    if os.getpid() != process or setup.most_recent_active_run is not None or not connection.owns_service:
        return
    with suppress(AttributeError, OSError):
        _tear_down(connection)


def end_service(*, at_once: bool = False) -> None:
    """End W&B's service if this process has started one, and whatever is open in it.

    Args:
        at_once: don't let it write what it holds.
    """
    setup: Any = getattr(sys.modules.get("wandb.sdk.wandb_setup"), "_singleton", None)
    with suppress(AttributeError, OSError):
        if at_once:
            setup._connection._proc._process.kill()
        else:
            _tear_down(setup._connection)


def _tear_down(connection: Any) -> None:
    """Have a service write what it holds and end, as W&B does, and kill it after `SERVICE_SECONDS`."""
    process = connection._proc._process

    def join() -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(SERVICE_SECONDS)

    connection._proc.join = join
    with suppress(AssertionError):  # it has been torn down already
        connection.teardown(0)
    process.kill()
