"""From a snapshot to a point."""
