"""What is found before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meditron_train.config.load import load_config
from meditron_train.flows.early_check import check_before_imports
from tests.refusal import refused

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture
def write(tmp_path):
    """write(hf_config, **sections) -> a configuration whose files are all there."""

    def write(hf_config: dict, **sections) -> Path:
        (tmp_path / "tok").mkdir(exist_ok=True)
        for name in ("corpus.bin", "corpus.idx", "tok/tokenizer.json"):
            (tmp_path / name).touch()
        values = {
            "model": {"init": "random", "hf_config": hf_config},
            "data": {
                "tokenizer": str(tmp_path / "tok"),
                "train": [{"name": "c", "path": str(tmp_path / "corpus")}],
            },
            "logging": {"run_dir": str(tmp_path / "run")},
            **sections,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_a_shape_needs_no_model_type_and_no_vocabulary(write):
    check_before_imports(load_config(write(SHAPE)), 1)


def test_everything_wrong_with_a_shape_is_one_message_with_the_nearest_keys(write):
    wrong = {**SHAPE, "rope_thetaa": 1e6, "num_layers_of_it": 3, "hidden_size": "64"}
    del wrong["intermediate_size"]
    config = load_config(write(wrong))
    with refused(
        "model.hf_config", "hidden_size", "must be a positive integer", "missing intermediate_size", "rope_thetaa",
        "did you mean rope_theta?", "num_layers_of_it",
    ):  # fmt: skip
        check_before_imports(config, 1)


def test_a_wrong_shape_is_said_with_what_else_is_wrong(write, tmp_path):
    path = write({**SHAPE, "rope_thetaa": 1e6}, train={"global_batch_size": 4})
    (tmp_path / "corpus.idx").unlink()
    with refused(
        "3 problems", "rope_thetaa", "did you mean rope_theta?\n", "global_batch_size 4", "corpus.idx"
    ):
        check_before_imports(load_config(path), 3)


def test_what_does_not_divide_is_found_for_all_ranks(write):
    with refused("global_batch_size 4", "3 ranks"):
        check_before_imports(load_config(write(SHAPE, train={"global_batch_size": 4})), 3)


def test_a_resume_is_left_to_the_start_itself(write, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    check_before_imports(load_config(write({})), 1)


def test_a_directory_without_a_checkpoint_is_no_resume(write, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with refused("hidden_size"):
        check_before_imports(load_config(write({})), 1)


def test_torch_is_not_imported_for_it(write):
    program = (
        "import sys\nfrom meditron_train.cli.main import app\n"
        f"try: app(['train', {str(write({}))!r}])\n"
        "except SystemExit as end: assert end.code == 2, end.code\n"
        "sys.exit('loaded torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "model.hf_config: missing" in done.stderr, done.stderr
