"""`meditron-train doctor`: its table and its JSON."""

from __future__ import annotations

import json

import pytest
import typer

from meditron_train.cli.doctor import doctor
from meditron_train.flows import doctor as flow
from meditron_train.flows.doctor import Finding


def test_json_is_one_document_on_stdout(capsys):
    with pytest.raises(typer.Exit) as exit_:
        doctor(json_output=True)
    report = json.loads(capsys.readouterr().out)
    assert exit_.value.exit_code == (0 if report["can_train"] else 1)
    names = [entry["name"] for entry in report["findings"]]
    assert len(set(names)) == len(names)
    wanted = {"python", "torch", "cuda", "nccl", "gloo", "megatron-core", "C++ core", "C++ operators"}
    wanted |= {"saving checkpoints"}
    wanted |= {
        "C++ operators, CUDA part",
        "apex",
        "transformer-engine",
        "slurm",
        "launcher",
        "host name",
        "disk",
        "/dev/shm",
    }
    wanted |= {f"attention: {name}" for name in ("native", "flash_attn", "transformer_engine", "sdpa")}
    assert set(names) == wanted
    for entry in report["findings"]:
        assert set(entry) == {"name", "found", "in_use", "detail", "remedy", "required"}
        assert entry["detail"]
        assert not (entry["required"] and not entry["in_use"] and not entry["remedy"]), entry


def test_the_table_fits_80_columns_and_what_to_do_stands_below(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    findings = [
        Finding("torch", True, True, "2.10.0", required=True),
        Finding("a name as long as C++ operators", False, False, "not built " * 12, "pip install [x] " * 8),
    ]
    monkeypatch.setattr(flow, "examine", lambda: findings)
    with pytest.raises(typer.Exit):
        doctor(json_output=False)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    table, _, remedies = out.partition("What to do:")
    assert "pip install" not in table and "a name as long as C++ operators: pip install [x]" in remedies


def test_the_table_names_everything(capsys):
    with pytest.raises(typer.Exit):
        doctor(json_output=False)
    out = capsys.readouterr().out
    for name in ("torch", "megatron-core", "attention: native", "/dev/shm"):
        assert name in out
