"""Where points and transitions are written to."""
