"""How many steps a run takes, where its configuration says so in tokens, epochs or budgets."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from meditron_train.config.check import missing_data_files
from meditron_train.config.schema import Config
from meditron_train.data.packing.batch_schedule import BatchSchedule
from meditron_train.log import get_logger

if TYPE_CHECKING:
    from meditron_train.data.packed import PackedDataset

UNKNOWN_STEPS = (
    "the number of steps is not known here: train.epochs and token_budget need the data and the tokenizer"
)

_log = get_logger(__name__)


def resolve_steps(config: Config) -> tuple[Config, PackedDataset | None]:
    """`with_steps` for every command: the data are opened where they are needed for it and are on this machine.

    Returns:
        the configuration, which has no `knows_steps` where the data are not here; and the data, if they were opened.

    Raises:
        UserError: the data are not what they should be.
    """
    config = with_steps(config, None)
    if config.knows_steps or missing_data_files(config):
        return config, None
    data = open_train_data(config)
    return with_steps(config, data), data


def open_train_data(config: Config) -> PackedDataset:
    """The training data of the run.

    Raises:
        UserError: as `build_train_dataset`.
    """
    from meditron_train.data.packed import (
        build_train_dataset,
    )  # it imports torch, which `plan` can do without
    from meditron_train.data.sources import vocabulary

    return build_train_dataset(
        config.data, config.train.seq_len, vocabulary(config.data), BatchSchedule.of(config.train)
    )


def with_steps(config: Config, data: PackedDataset | None) -> Config:
    """The configuration with its length in `train.steps` alone, rounded up to whole steps.

    Args:
        data: the training data. Without them only train.tokens can be turned into steps; where train.epochs or
            budgets say the length, the configuration is returned as it is.
    """
    train = config.train
    if config.knows_steps:
        return config
    if train.tokens is not None:
        num_samples = -(-train.tokens // train.seq_len)
    elif data is None:
        return config
    elif train.epochs is not None:
        num_samples = math.ceil(Fraction(repr(train.epochs)) * data.samples_per_epoch)
    else:
        assert data.budget_samples is not None
        num_samples = data.budget_samples
    steps = BatchSchedule.of(config.train).steps_for(num_samples)
    _log.info("train.steps is %d: %d samples of %d tokens", steps, num_samples, train.seq_len)
    return config.model_copy(
        update={"train": train.model_copy(update={"steps": steps, "tokens": None, "epochs": None})}
    )


def warn_of_other_budget(config: Config, data: PackedDataset) -> None:
    """Warn when the steps take more or less than the sum of token_budget."""
    if data.budget_samples is None:
        return
    schedule = BatchSchedule.of(config.train)
    needed = schedule.steps_for(data.budget_samples)
    steps = config.train.steps
    if abs(steps - needed) > max(1, needed // 100):
        budget = sum(entry.token_budget or 0 for entry in config.data.train)
        num_tokens = schedule.samples_before(steps + 1) * config.train.seq_len
        _log.warning(
            "train.steps %d takes %d tokens, padding included, but the sum of token_budget is %d: every source then "
            "gives %.3g times its budget. For the budgets leave train.steps out, which makes %d",
            *(steps, num_tokens, budget, steps / needed, needed),
        )
