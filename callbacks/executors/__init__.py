"""Where else snapshots can be measured: on a cluster."""
