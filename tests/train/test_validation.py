"""A long validation is neither a hang nor in the way of a request to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from meditron_train.errors import Cause
from meditron_train.report.status import Requeue, read_requeue
from meditron_train.train.life.heartbeat import Pulse
from tests.distributed import run_ranks
from tests.report.metrics_file import read_metrics
from tests.train.test_loop import run, run_rank

STEPS = {"steps": 4, "seq_len": 64, "global_batch_size": 4, "precision": "fp32"}


def watched_rank(
    rank: int, world_size: int, config_file: Path, stop_at_batch: int | None
) -> tuple[int, int, int]:
    """Run; (exit code, validation batches, signs of life in validation). A file asks to stop at a batch."""
    from meditron_train.config.load import load_config
    from meditron_train.train.engine import Engine

    run_dir = load_config(config_file, []).logging.run_dir
    evaluate, enter = Engine.evaluate, Pulse.enter
    num_batches, phases = 0, []

    def evaluate_and_count(self, batches):
        nonlocal num_batches
        num_batches += 1
        if num_batches == stop_at_batch and rank == 0:
            (run_dir / "stop").touch()
        return evaluate(self, batches)

    def enter_and_note(self, phase):
        phases.append(phase)
        enter(self, phase)

    Engine.evaluate, Pulse.enter = evaluate_and_count, enter_and_note
    try:
        code = run_rank(rank, world_size, config_file)
    finally:
        Engine.evaluate, Pulse.enter = evaluate, enter
    return code, num_batches, phases.count("validation")


def test_every_batch_is_a_sign_of_life(write_config):
    config = write_config(train=STEPS, validation={"interval": 2, "steps": 2})
    outcomes = run_ranks(watched_rank, 2, config, None)
    assert outcomes == [(0, num_batches := outcomes[0][1], num_batches)] * 2 and num_batches >= 2


@pytest.mark.long
def test_a_request_to_stop_ends_the_validation(write_config, tmp_path):
    config = write_config(train=STEPS, validation={"interval": 2, "steps": 2})
    [(code, num_batches, _)] = run_ranks(watched_rank, 1, config, 1)
    run_dir = tmp_path / "run"
    assert (code, num_batches) == (85, 1)
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == ["step_00000002"]
    assert read_requeue(run_dir) == Requeue(Cause.STOP_FILE, f"the file {run_dir / 'stop'}")
    assert not (run_dir / "stop").exists()
    assert "validation_loss.held-out" not in read_metrics(run_dir)[-1]
    metrics = run(config)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4] and "validation_loss.held-out" in metrics[-1]
