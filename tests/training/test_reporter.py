from trainfw.training import Reporter, reporter


def test_long_work_says_how_fast_it_is(monkeypatch, capsys):
    seconds = iter([0.0, 5.0, 12.0, 15.0, 23.0])
    monkeypatch.setattr(reporter.time, "monotonic", lambda: next(seconds))
    line = Reporter()
    for completed in (1, 10, 31, 40, 2301):
        line.progress("Tokenising, MB", completed, 4000)
    said = ["Tokenising, MB: 31 of 4,000 (2.5/s)", "Tokenising, MB: 2,301 of 4,000 (100/s)"]
    assert capsys.readouterr().out.splitlines() == said
