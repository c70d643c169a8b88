from phasewatch.monitor import progress


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0)
    assert list(progress.progress(range(3), "Reading")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress.progress(range(3), "Reading")) == [0, 1, 2]
    assert "Reading" in capsys.readouterr().err


def test_what_is_short_shows_none(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress.progress(range(3), "Reading")) == [0, 1, 2]
    assert "Reading" not in capsys.readouterr().err
