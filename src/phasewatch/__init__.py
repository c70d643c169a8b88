"""phasewatch tells when a model in training reorganised itself, and how.

A training run leaves snapshots; a probe turns a snapshot into a point, its loss and an estimate of its local learning
coefficient; points in order make a trajectory; between a trajectory's plateaus lie its transitions; sinks write
points and transitions down.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

if TYPE_CHECKING:
    from phasewatch.callbacks.sinks.report import write_report
    from phasewatch.callbacks.sinks.wandb import WandbSink
    from phasewatch.callbacks.trainers.loop import PhaseMonitor
    from phasewatch.callbacks.trainers.schedule import Budget, every, log_spaced
    from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
    from phasewatch.monitor.estimates.estimate import Estimate, Health
    from phasewatch.monitor.estimates.uncertainty import Difference, difference
    from phasewatch.monitor.model.heads import heads
    from phasewatch.monitor.probing.calibrate import calibrate
    from phasewatch.monitor.probing.llc import estimate_llc
    from phasewatch.monitor.probing.probe import Probe
    from phasewatch.monitor.runs.replay import replay
    from phasewatch.monitor.runs.sink import Sink
    from phasewatch.monitor.sampling.settings import SGLD
    from phasewatch.monitor.snapshots.averaging import averaged
    from phasewatch.monitor.snapshots.series import open_series
    from phasewatch.monitor.snapshots.snapshot import Snapshot, SnapshotFolder
    from phasewatch.monitor.trajectories.coincide import Coincidence, Coincidences, coincide
    from phasewatch.monitor.trajectories.trajectory import Point, Trajectory
    from phasewatch.monitor.trajectories.transitions import Kind, Transition, find_transitions

_HOME = {
    "Budget": "callbacks.trainers.schedule",
    "Coincidence": "monitor.trajectories.coincide",
    "Coincidences": "monitor.trajectories.coincide",
    "Difference": "monitor.estimates.uncertainty",
    "Estimate": "monitor.estimates.estimate",
    "Health": "monitor.estimates.estimate",
    "Kind": "monitor.trajectories.transitions",
    "PhaseMonitor": "callbacks.trainers.loop",
    "PhasewatchError": "monitor.errors",
    "PhasewatchWarning": "monitor.errors",
    "Point": "monitor.trajectories.trajectory",
    "Probe": "monitor.probing.probe",
    "SGLD": "monitor.sampling.settings",
    "Sink": "monitor.runs.sink",
    "Snapshot": "monitor.snapshots.snapshot",
    "SnapshotFolder": "monitor.snapshots.snapshot",
    "Trajectory": "monitor.trajectories.trajectory",
    "Transition": "monitor.trajectories.transitions",
    "WandbSink": "callbacks.sinks.wandb",
    "averaged": "monitor.snapshots.averaging",
    "calibrate": "monitor.probing.calibrate",
    "coincide": "monitor.trajectories.coincide",
    "difference": "monitor.estimates.uncertainty",
    "estimate_llc": "monitor.probing.llc",
    "every": "callbacks.trainers.schedule",
    "find_transitions": "monitor.trajectories.transitions",
    "heads": "monitor.model.heads",
    "log_spaced": "callbacks.trainers.schedule",
    "open_series": "monitor.snapshots.series",
    "replay": "monitor.runs.replay",
    "write_report": "callbacks.sinks.report",
}

__all__ = [
    "SGLD",
    "Budget",
    "Coincidence",
    "Coincidences",
    "Difference",
    "Estimate",
    "Health",
    "Kind",
    "PhaseMonitor",
    "PhasewatchError",
    "PhasewatchWarning",
    "Point",
    "Probe",
    "Sink",
    "Snapshot",
    "SnapshotFolder",
    "Trajectory",
    "Transition",
    "WandbSink",
    "averaged",
    "calibrate",
    "coincide",
    "difference",
    "estimate_llc",
    "every",
    "find_transitions",
    "heads",
    "log_spaced",
    "open_series",
    "replay",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that reading a run never waits for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'phasewatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(str(_HOME[name])), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
