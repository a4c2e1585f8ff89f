"""Every command of docs/guides/convert.md runs, in the order in which it stands there, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meditron_train.cli.main import app
from tests import docs_check
from tests.checkpoint.megatron.fixtures import llm_args, write_legacy
from tests.checkpoint.megatron.test_rank_files import make_hf
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model

GUIDE = Path(__file__).parents[1] / "docs/guides/convert.md"
MADE = ("HF_DIR", "RUN_DIR", "TOKENIZER_DIR")  # the others are made by the commands


@pytest.mark.long
def test_every_command_of_the_guide_runs(tmp_path: Path) -> None:
    named = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "rms_norm_eps": 1e-5}
    tensors, config = make_hf(tmp_path / "HF_DIR", vocab_size=VOCAB_SIZE, **named)
    write_tokenizer_model(tmp_path / "HF_DIR")
    write_tokenizer_model(tmp_path / "TOKENIZER_DIR")
    run = tmp_path / "RUN_DIR"
    write_legacy(run, tensors, llm_args(config), style="megatron-llm", tp=2, pp=2, padded_vocab_size=640)
    commands = [words for block in docs_check.blocks(GUIDE) for _, words in docs_check.commands(block)]
    assert len(commands) >= 14
    for words in commands:
        words = [str(tmp_path / w) if w.split("/")[0].endswith("_DIR") else w for w in words]
        if words[0] == "torchrun":
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
            done = subprocess.run(
                launcher,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert done.returncode == 0, done.stderr
        else:
            assert words[0] == "meditron-train"
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{words}: {result.output}"
    assert (tmp_path / "SHARED_DIR" / "meta.json").is_file()
