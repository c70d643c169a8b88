"""Smooth scores under sharp metrics: links, verdicts, forecasts, the emergence law and reversals. numpy, scipy."""

from phasewatch.monitor.emergence.attribution import Attribution, attribute
from phasewatch.monitor.emergence.forecast import Forecast, forecast
from phasewatch.monitor.emergence.items import Items, Scores, scores
from phasewatch.monitor.emergence.law import EmergenceLaw
from phasewatch.monitor.emergence.links import Link, choice_accuracy, exact_match
from phasewatch.monitor.emergence.onset import Onset
from phasewatch.monitor.emergence.reading import read_samples
from phasewatch.monitor.emergence.retrodiction import Retrodiction, retrodict
from phasewatch.monitor.emergence.reversal import Reversal, reversal
from phasewatch.monitor.emergence.verdict import Verdict, verdict

__all__ = [
    "Attribution",
    "EmergenceLaw",
    "Forecast",
    "Items",
    "Link",
    "Onset",
    "Retrodiction",
    "Reversal",
    "Scores",
    "Verdict",
    "attribute",
    "choice_accuracy",
    "exact_match",
    "forecast",
    "read_samples",
    "retrodict",
    "reversal",
    "scores",
    "verdict",
]
