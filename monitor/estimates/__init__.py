"""From chains to a value, its error and a verdict. numpy and scipy only."""
