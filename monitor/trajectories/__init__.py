"""Points in order of step, their stages and transitions. numpy and scipy only."""
