"""A model's weights at training steps, and the files they lie in."""
