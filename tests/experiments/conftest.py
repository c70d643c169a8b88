import importlib
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def script(monkeypatch):
    """Imports a script of experiments/, which finds its neighbours as when it is run; all are forgotten in the end."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == EXPERIMENTS:
            del sys.modules[name]
