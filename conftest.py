"""What `pytest --doctest-modules` leaves alone."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["monitor/model/compiled.py"]
"""The kernels of a GPU can only be imported where there is one."""
