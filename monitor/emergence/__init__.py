"""Smooth scores under sharp metrics: links, verdicts, forecasts, the emergence law and reversals. numpy and scipy only."""
