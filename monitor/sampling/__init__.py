"""Chains around a snapshot: the settings, the steps, and the loops that take them."""
