"""More or fewer ranks after a restart: the same batches, the same samples in the same order, the same losses."""

from __future__ import annotations

import pytest

from meditron_train.data.trace import trace_step
from meditron_train.report.status import read_status
from tests.train.test_failures import failure
from tests.train.test_loop import losses, run, stop_file_after

TRAIN = {"steps": 12, "seq_len": 64, "global_batch_size": 12, "precision": "fp32", "device": "cpu"}


@pytest.mark.long
def test_data_parallelism_follows_the_number_of_ranks(write_config, tmp_path):
    logging = {"wandb": "disabled", "tensorboard": False}
    whole = run(
        write_config("whole.yaml", train=TRAIN, logging={**logging, "run_dir": str(tmp_path / "whole")}),
        world_size=4,
    )
    config = write_config(train=TRAIN, checkpoint={"interval": 100})
    stop_file_after(config, tmp_path / "run", step=4, world_size=4)
    stop_file_after(config, tmp_path / "run", step=8, world_size=2)
    resumed = run(config, world_size=3)
    assert [line["step"] for line in resumed] == list(range(1, 13))
    assert losses(resumed)[:4] == losses(whole)[:4]
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    for step in (1, 5, 9, 12):
        one, other = (trace_step(tmp_path / name, step) for name in ("run", "whole"))
        assert one["segments"] == other["segments"] and one["segments"]
    starts = read_status(tmp_path / "run")["starts"]
    assert [entry["world_size"] for entry in starts] == [4, 2, 3]
    assert [entry["layout"]["tensor"] for entry in starts] == [1, 1, 1]


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_refused(write_config, tmp_path):
    config = write_config(train=TRAIN)
    stop_file_after(config, tmp_path / "run", step=4, world_size=2)
    message = failure(config, world_size=5)
    assert "train.global_batch_size 12 is not divisible by" in message and "1 x 5" in message
    assert read_status(tmp_path / "run")["state"] == "stopped", "a refused start leaves the run as it was"
