"""verify and inspect: checkpoints of another Megatron, with a tokenizer of their own or none, and what their arguments
cannot say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meditron_train.checkpoint.convert.engine import NO_LIMITS
from meditron_train.checkpoint.convert.from_hf import hf_to_megatron_lm, hf_to_sharded
from meditron_train.checkpoint.convert.megatron_to_hf import megatron_to_hf
from meditron_train.checkpoint.convert.to_rank_files import reshard
from meditron_train.checkpoint.megatron.source import MegatronOptions
from meditron_train.verify.inspect import inspect_directory
from meditron_train.verify.verify import verify
from tests.checkpoint.convert.test_for_megatron_lm import write_source
from tests.checkpoint.megatron.fixtures import edited
from tests.checkpoint.tiny_llama import change_json
from tests.long import mostly_long
from tests.verify.test_verify import named
from tests.verify.test_verify_beside import swap_ids

MISTRAL = {"model_type": "mistral", "sliding_window": None}


def linear(factor: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": factor}}


QWEN2 = {"model_type": "qwen2", "head_dim": None}


@pytest.mark.parametrize("changes", mostly_long([{}, QWEN2, MISTRAL], {}, QWEN2), ids=str)
def test_its_own_tokenizer_is_compared(tmp_path: Path, changes: dict[str, Any]) -> None:
    source, run = write_source(tmp_path / "hf", **changes), tmp_path / "run"
    hf_to_sharded(source, tmp_path / "checkpoint")
    hf_to_megatron_lm(source, run)
    others = (source, tmp_path / "checkpoint", tmp_path / "checkpoint" / "manifest.json")
    for other in others:
        assert (verify(other, run).differences, verify(run, other).differences) == ((), ())
        assert verify(other, run).with_tokenizers
    (run / "manifest.json").unlink()
    swap_ids(run)
    for other in others:
        for found in (named(verify(other, run)), named(verify(run, other))):
            assert "vocabulary" in found, found


def test_without_a_tokenizer_of_its_own_none_is_said_to_be_equal(tmp_path: Path, capsys) -> None:
    from meditron_train.cli.convert import _print_comparison

    source, run = write_source(tmp_path / "hf"), tmp_path / "run"
    hf_to_megatron_lm(source, run)
    for whole in (True, False):
        found = verify(source, run)
        assert found.differences == () and found.with_tokenizers == whole
        _print_comparison(found)
        assert ("tokenizer" in capsys.readouterr().out) == whole
        for path in (run / "manifest.json", *run.glob("*token*")):
            path.unlink(missing_ok=True)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes", [MISTRAL, linear(2.0), {**MISTRAL, **linear(2.0)}], ids=["mistral", "linear", "both"]
)
def test_what_the_arguments_cannot_say(tmp_path: Path, changes: dict[str, Any]) -> None:
    source, run, ranks = write_source(tmp_path / "hf", **changes), tmp_path / "run", tmp_path / "ranks"
    hf_to_sharded(source, tmp_path / "checkpoint")
    hf_to_megatron_lm(source, run)
    reshard(tmp_path / "checkpoint", ranks, tp=2, pp=1)
    assert verify(run, ranks).differences == ()
    for written in (run, ranks):
        for other in (source, tmp_path / "checkpoint", tmp_path / "checkpoint" / "manifest.json"):
            assert (verify(other, written).differences, verify(written, other).differences) == ((), ())
        found = inspect_directory(written)
        assert found["intact"]
        assert found["model"]["rope"]["factor"] == (2.0 if "rope_parameters" in changes else 1.0)
        back = tmp_path / f"{written.name}-back"
        options = MegatronOptions(config=source if "rope_parameters" in changes else None)
        megatron_to_hf(written, back, options, limits=NO_LIMITS)
        assert verify(source, back).differences == ()


def test_what_the_arguments_do_say_is_compared(tmp_path: Path) -> None:
    source, run = write_source(tmp_path / "hf", **linear(2.0)), tmp_path / "run"
    hf_to_megatron_lm(source, run)
    other = write_source(tmp_path / "other", **linear(4.0))
    assert "rope.factor" in named(verify(other, run))
    change_json(other / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert "rope.theta" in named(verify(other, run))
    assert "rope.kind" not in named(verify(other, run))


def test_a_checkpoint_without_arguments_is_compared_with_what_the_other_side_describes(
    tmp_path: Path,
) -> None:
    source, ranks = write_source(tmp_path / "hf"), tmp_path / "ranks"
    hf_to_sharded(source, tmp_path / "checkpoint")
    reshard(tmp_path / "checkpoint", ranks, tp=1, pp=1)
    (ranks / "manifest.json").unlink()
    with edited(ranks / "release" / "mp_rank_00" / "model_optim_rng.pt") as content:
        del content["args"]
    assert (verify(source, ranks).differences, verify(ranks, source).differences) == ((), ())
