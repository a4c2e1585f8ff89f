from __future__ import annotations

from typer.testing import CliRunner

from meditron_train.cli.main import app
from tests.report.synthetic_run import write_run


def report(*words: object):
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_one_run_and_several(tmp_path, monkeypatch):
    one, other = write_run(tmp_path / "one", num_steps=20), write_run(tmp_path / "other", num_steps=20)
    assert report(one).stdout.strip() == str(one / "report.html")
    assert (one / "report.html").read_text().startswith("<!doctype html>")
    assert report(one, "--output", tmp_path / "a/run.md").exit_code == 0
    assert (tmp_path / "a/run.md").read_text().startswith("# one: finished")
    monkeypatch.chdir(tmp_path)
    assert report(one, other).stdout.strip() == "report.html"


def test_mistakes_end_with_2(tmp_path):
    run = write_run(tmp_path / "run", num_steps=5)
    assert report(tmp_path / "absent").exit_code == 2
    assert report(run, "--output", tmp_path / "x.pdf").exit_code == 2
    assert report(run, "--serve", "--output", tmp_path / "x.html").exit_code == 2
    assert report(run, run, "--check-hashes").exit_code == 2
