"""The user's model, loss and data as a function of the sampled weights."""
