"""What the report's chart draws, as JSON that can stand in a page, and the script that draws it."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from phasewatch.monitor.estimates.estimate import Health
from phasewatch.monitor.formatting import printable
from phasewatch.monitor.trajectories.changes import Transition
from phasewatch.monitor.trajectories.points import Point

DIGITS = 6
"""Values are drawn with as many digits, to keep the page small."""

SCRIPT = (Path(__file__).parent / "report.js").read_text(encoding="utf-8")
"""The script that draws, which loads nothing."""

SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
"""What the page's security policy names, so that no other script runs in it."""


def chart_data(points: Sequence[Point], transitions: Sequence[Transition], metrics: Sequence[str]) -> Markup:
    """The chart's points and stages as JSON in which nothing can end the element that it stands in.

    Args:
        points: the points to draw, in order of step.
        transitions: the stages to shade.
        metrics: the metrics that get a panel.

    Returns:
        The JSON.
    """
    failed = [point.llc.health.failed for point in points]
    llc = [None if bad else _rounded(point.llc.value) for bad, point in zip(failed, points, strict=True)]
    panels: list[dict[str, Any]] = [
        {"name": "complexity λ̂", "values": llc, "errors": [_rounded(point.llc.error) for point in points]},
        {"name": "loss", "values": [_rounded(point.loss) for point in points]},
    ]
    for name in metrics:
        values = [_rounded(point.metrics.get(name, math.nan)) for point in points]
        panels.append({"name": printable(name), "values": values})
    healths = list(Health)
    data = {
        "steps": [point.step for point in points],
        "panels": panels,
        "llc": 0,
        "verdicts": [health.name.lower().replace("_", " ") for health in healths],
        "verdict": [healths.index(point.llc.health) for point in points],
        "doubtful": [int(point.llc.health.doubtful) for point in points],
        "failed": [int(bad) for bad in failed],
        "stages": [
            {
                "label": stage.kind.label,
                "look": stage.kind.label.lower(),
                "start": stage.start,
                "end": stage.end,
                "startInterval": stage.start_interval,
                "endInterval": stage.end_interval,
                "provisional": stage.provisional,
            }
            for stage in transitions
        ],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
