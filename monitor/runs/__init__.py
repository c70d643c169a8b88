"""A run's folder, and the one path from a snapshot to a recorded point."""
