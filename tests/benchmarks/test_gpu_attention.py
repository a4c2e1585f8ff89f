"""The attention benchmark for GPUs keeps its table whatever a tool does, and gives each tool what it knows."""

from __future__ import annotations

import contextlib
import json
import sys
import types

import pytest
import torch

from benchmarks.gpu import attention

SHAPE = (2, 1, 64, "cpu")


def fails_backward(work: attention.Work) -> torch.Tensor:
    out = attention.ours(work)
    if out.requires_grad:
        out.register_hook(raise_out_of_memory)
    return out


def raise_out_of_memory(_gradient: torch.Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def tools(monkeypatch):
    """tools(more) → the table has ours and `more`."""

    def choose(**more):
        chosen = {attention.OURS: attention.ours, **more}
        monkeypatch.setattr(attention, "TOOLS", chosen)

    return choose


def test_a_tool_that_fails_in_its_backward_loses_that_cell_alone(tools):
    tools(broken=fails_backward)
    works = [attention.make_work(name, [5, 4], *SHAPE) for name in ("first", "second")]
    kept = []
    table = attention.measure(works, "cpu", 2, 1, lambda table: kept.append(json.loads(json.dumps(table))))
    assert len(table) == 4 and [len(each) for each in kept] == [1, 2, 3, 4]
    for column in table.values():
        assert column[attention.OURS] > 0
    for work in ("first", "second"):
        assert table[f"{work}, forward"]["broken"] > 0
        assert table[f"{work}, forward + backward"]["broken"] == "no: OutOfMemoryError: CUDA out of memory"
    text = attention.as_markdown(table)
    assert text.count("- broken: no: OutOfMemoryError: CUDA out of memory") == 1


def test_what_is_killed_has_written_its_columns(tools, tmp_path):
    def stops(work: attention.Work) -> torch.Tensor:
        if work.name != "one document":
            raise KeyboardInterrupt
        return attention.ours(work)

    tools(stops=stops)
    result_file = tmp_path / "result.json"
    with contextlib.suppress(KeyboardInterrupt):
        attention.main(["--tiny", "--device", "cpu", "--json", str(result_file)])
    assert list(json.loads(result_file.read_text())) == [
        "one document, forward",
        "one document, forward + backward",
    ]


def test_ours_that_fails_is_a_row_and_the_exit_status(tools, monkeypatch, capsys):
    tools()
    monkeypatch.setitem(attention.TOOLS, attention.OURS, fails_backward)
    assert attention.main(["--tiny", "--device", "cpu"]) == 1
    assert "| meditron-train | " in capsys.readouterr().out


def test_a_tool_with_other_numbers_is_refused(tools):
    tools(wrong=lambda work: 2 * attention.ours(work))
    table = attention.measure([attention.make_work("w", [9], *SHAPE)], "cpu", 1, 1, lambda table: None)
    assert "differs from ours" in table["w, forward"]["wrong"]


def test_rope_before_a_peer_is_the_rotation_of_our_kernels():
    work = attention.make_work("w", [40, 9], *SHAPE)
    with torch.no_grad():
        plain = attention.ours(work)
        inside = attention.ours_with_rope(work)
        before = attention.rope_before(attention.ours, compiled=False)(work)
    torch.testing.assert_close(inside, before, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(inside, plain, rtol=2e-2, atol=2e-2)
    assert float(work.rotation.sin_PC[40].abs().max()) == 0  # each document starts at position 0


@pytest.mark.parametrize("heads, words", [((2, 2), set()), ((2, 1), {"enable_gqa"})])
def test_varlen_attn_is_told_of_groups_only_where_there_are(monkeypatch, heads, words):
    """torch 2.11 has no such argument."""
    seen = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size, **more):
        seen.append(set(more))
        return q

    stand_in = types.ModuleType("torch.nn.attention.varlen")
    stand_in.varlen_attn = varlen_attn
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    attention.torch_varlen(attention.make_work("w", [9], *heads, 64, "cpu"))
    assert seen == [words]
