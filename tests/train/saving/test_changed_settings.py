from __future__ import annotations

import logging

import pytest
import yaml

from meditron_train.errors import UserError
from meditron_train.train.life.run_dir import RunDir
from meditron_train.train.saving.changed_settings import check_settings
from tests.train.life.test_run_dir import make_config


@pytest.fixture
def messages():
    """What the module logs, whatever logging was set up by others."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("meditron_train.train.saving.changed_settings")
    level, logger.level = logger.level, logging.INFO
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.level = level


@pytest.fixture
def resumed(tmp_path) -> RunDir:
    run_dir = RunDir(tmp_path)
    run_dir.create()
    (run_dir.checkpoints / "step_00000005").mkdir()
    run_dir.write_config(make_config())
    return run_dir


def test_the_same_configuration_resumes(resumed, messages):
    check_settings(resumed, make_config())
    assert messages == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model__from": "/models/other"}, "model.from: '/models/llama' -> '/models/other'"),
        ({"data__tokenizer": "/t"}, "data.tokenizer: '/models/llama' -> '/t'"),
        ({"data__packing": "concat"}, "data.packing: 'best_fit' -> 'concat'"),
        ({"data__seed": 1}, "data.seed: 1234 -> 1"),
        ({"data__special_tokens": ["[bib]"]}, "data.special_tokens: [] -> ['[bib]']"),
        ({"data__validation_fraction": 0.1}, "data.validation_fraction: 0.0 -> 0.1"),
        (
            {"data__train": [{"name": "pubmed", "path": "/data/pubmed", "weight": 2.0}]},
            "data.train[0].weight: 1.0 -> 2.0",
        ),
        ({"train__seq_len": 64}, "train.seq_len: 128 -> 64"),
        ({"train__global_batch_size": 16}, "train.global_batch_size: 8 -> 16"),
        ({"train__batch_ramp": {"start": 2, "increment": 2, "samples": 9}}, "train.batch_ramp: None -> {"),
        ({"train__seed": 1}, "train.seed: 1234 -> 1"),
        ({"train__precision": "fp32"}, "train.precision: 'bf16' -> 'fp32'"),
    ],
)
def test_another_model_or_other_data_are_refused(resumed, changes, line):
    with pytest.raises(UserError) as caught:
        check_settings(resumed, make_config(**changes))
    assert f"  - {line}" in str(caught.value)
    assert str(caught.value).count("  - ") == 1


def test_every_difference_is_listed_at_once(resumed):
    two = [{"name": "pubmed", "path": "/data/pubmed"}, {"name": "papers", "path": "/data/papers"}]
    with pytest.raises(UserError) as caught:
        check_settings(resumed, make_config(data__train=two, train__seed=1, train__steps=7))
    assert str(caught.value).count("  - ") == 2
    assert "data.train: " in str(caught.value)
    assert "train.steps" not in str(caught.value)


def test_layout_length_logging_and_optimizer_may_change(resumed, messages):
    changed = make_config(
        parallel__tensor=2,
        train__steps=200,
        train__micro_batch_size=4,
        train__recompute="full",
        checkpoint__interval=7,
        logging__wandb="offline",
        optimizer__lr=1e-4,
        data__prefetch=5,
        data__validation=[{"name": "pubmed", "path": "/data/heldout"}],
    )
    check_settings(resumed, changed)
    assert len(messages) == 1
    for part in ("parallel.tensor: 1 -> 2", "train.steps: 100 -> 200", "optimizer.lr: 0.0003 -> 0.0001"):
        assert part in messages[0]


def test_without_a_checkpoint_anything_goes(resumed):
    (resumed.checkpoints / "step_00000005").rmdir()
    check_settings(resumed, make_config(model__from="/models/other"))


def test_keys_of_a_later_version_are_not_held_against_an_older_run(resumed):
    values = yaml.safe_load(resumed.config_file.read_text())
    del values["data"]["packing"]
    resumed.config_file.write_text(yaml.safe_dump(values))
    check_settings(resumed, make_config(data__packing="concat"))


def test_a_dollar_in_a_path_is_no_difference(resumed):
    config = make_config(model__from="/models/${odd}")
    resumed.write_config(config)
    check_settings(resumed, config)


def test_an_unreadable_config_beside_checkpoints_is_refused(resumed):
    resumed.config_file.write_text("{")
    with pytest.raises(UserError, match=r"(?s)cannot be read.*meta\.json has a copy"):
        check_settings(resumed, make_config())
