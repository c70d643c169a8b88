"""phasewatch tells when a model in training reorganised itself, and how.

A training run leaves snapshots; a probe turns a snapshot into a point, its loss and an estimate of its local learning
coefficient; points in order make a trajectory; between a trajectory's plateaus lie its transitions; sinks write
points and transitions down.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phasewatch.callbacks.loop import PhaseMonitor
    from phasewatch.callbacks.report import write_report
    from phasewatch.callbacks.schedule import Budget, every, log_spaced
    from phasewatch.callbacks.weights_and_biases import WandbSink
    from phasewatch.monitor.averaging import averaged
    from phasewatch.monitor.calibrate import calibrate
    from phasewatch.monitor.coincide import Coincidence, Coincidences, coincide
    from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
    from phasewatch.monitor.estimate import Estimate, Health
    from phasewatch.monitor.heads import heads
    from phasewatch.monitor.llc import estimate_llc
    from phasewatch.monitor.probe import Probe
    from phasewatch.monitor.publish import Sink
    from phasewatch.monitor.replay import replay
    from phasewatch.monitor.series import open_series
    from phasewatch.monitor.sgld import SGLD
    from phasewatch.monitor.snapshot import Snapshot, SnapshotFolder
    from phasewatch.monitor.trajectory import Point, Trajectory
    from phasewatch.monitor.transitions import Kind, Transition, find_transitions
    from phasewatch.monitor.uncertainty import Difference, difference

_HOME = {
    "Budget": "callbacks.schedule",
    "Coincidence": "monitor.coincide",
    "Coincidences": "monitor.coincide",
    "Difference": "monitor.uncertainty",
    "Estimate": "monitor.estimate",
    "Health": "monitor.estimate",
    "Kind": "monitor.transitions",
    "PhaseMonitor": "callbacks.loop",
    "PhasewatchError": "monitor.errors",
    "PhasewatchWarning": "monitor.errors",
    "Point": "monitor.trajectory",
    "Probe": "monitor.probe",
    "SGLD": "monitor.sgld",
    "Sink": "monitor.publish",
    "Snapshot": "monitor.snapshot",
    "SnapshotFolder": "monitor.snapshot",
    "Trajectory": "monitor.trajectory",
    "Transition": "monitor.transitions",
    "WandbSink": "callbacks.weights_and_biases",
    "averaged": "monitor.averaging",
    "calibrate": "monitor.calibrate",
    "coincide": "monitor.coincide",
    "difference": "monitor.uncertainty",
    "estimate_llc": "monitor.llc",
    "every": "callbacks.schedule",
    "find_transitions": "monitor.transitions",
    "heads": "monitor.heads",
    "log_spaced": "callbacks.schedule",
    "open_series": "monitor.series",
    "replay": "monitor.replay",
    "write_report": "callbacks.report",
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
    value = getattr(importlib.import_module(f"phasewatch.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
