import pytest


@pytest.fixture
def reported(monkeypatch):
    """The runs whose report would be written: half a second, and nothing hangs on it."""
    from phasewatch.callbacks.trainers import session

    runs = []
    monkeypatch.setattr(session, "write_report", runs.append)
    return runs
