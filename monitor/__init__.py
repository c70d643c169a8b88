"""The science: snapshots, probes, points, trajectories and transitions, as values and functions."""
