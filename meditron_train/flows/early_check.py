"""Mistakes that can be found within a second, before torch is imported or a rank is started."""

from __future__ import annotations

from meditron_train.checkpoint.hf.config import random_model_config, read_hf_config
from meditron_train.config.check import check_config
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.tasks.catalogue import find_benchmarks
from meditron_train.train.length import with_steps
from meditron_train.train.life.run_dir import RunDir


def check_before_imports(config: Config, world_size: int) -> None:
    """Check the configuration with all that small files say; the tensors, the tokenizer and the data come later.

    Left to the start itself: a resume, which may do without its base model, and a length that only the data
    tell.

    Raises:
        UserError: something is wrong.
    """
    if config.validation.tasks:
        find_benchmarks(",".join(config.validation.tasks))
    is_resume = RunDir(config.logging.run_dir).has_checkpoints()
    config = with_steps(config, None)
    if is_resume or not config.knows_steps:
        return
    model, problem = None, None
    try:
        model = _model(config)
    except UserError as error:
        problem = str(error)
    check_config(config, model, world_size, model_problem=problem, with_warnings=False)


def _model(config: Config) -> ModelConfig | None:
    """Of a Hugging Face directory or `model.hf_config`; None where only heavier files say it, or nothing is there."""
    from_, hf_config = config.model.from_, config.model.hf_config
    if hf_config is not None:
        # The tokenizer's vocabulary takes a library to read: any size stands in for it.
        return random_model_config(hf_config, tokenizer_vocab_size=1)
    if from_ is not None and (from_ / "config.json").is_file():
        return read_hf_config(from_)
    return None
