"""Pictures of trajectories and calibrations."""
