"""Which model a configuration starts from, and how large it becomes: one answer for train, submit and plan.

torch is imported only where files have to be opened, as `plan` answers a second earlier without.
"""

from __future__ import annotations

from dataclasses import dataclass

from meditron_train.checkpoint.hf.config import random_model_config, read_hf_config
from meditron_train.checkpoint.sharded.store import newest_checkpoint
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.data.tokenizing.tokenizer import load_tokenizer
from meditron_train.errors import UserError


@dataclass(frozen=True)
class BaseModel:
    """The model as it is trained.

    Attributes:
        model: its shape, with room for data.special_tokens.
        num_new_tokens: rows that those add to the embedding.
    """

    model: ModelConfig
    num_new_tokens: int


def resolve_base_model(config: Config, stored: ModelConfig | None = None) -> BaseModel | None:
    """The model of model.from or model.hf_config; None where its files are not on this machine.

    No weight is read. Only those special tokens that the tokenizer does not have yet are new; without the tokenizer all
    of them count. A tokenizer that is too large by itself does not grow the model: `check_config` reports it.

    Args:
        stored: the shape of the model, where its files are not here and it is known otherwise.

    Raises:
        UserError: the model is not one that is supported, or a sharded checkpoint would have to grow.
    """
    stored = stored or _stored_model(config)
    if stored is None:
        return None
    added = config.data.special_tokens
    if not added:
        return BaseModel(stored, 0)
    size = tokenizer_size(config)
    if size is None:
        return _grown(config, stored, stored.vocab_size + len(added))
    base_size = load_tokenizer(config.data.tokenizer).vocab_size
    fits = base_size > stored.vocab_size or size <= stored.vocab_size
    return _grown(config, stored, stored.vocab_size if fits else size)


def with_a_base(config: Config) -> Config:
    """The configuration; where the base model is gone and the run has a checkpoint, with that in its place.

    A resume reads nothing of the base model, unless it trains adapters.
    """
    from_ = config.model.from_
    if from_ is None or from_.exists() or config.lora is not None:
        return config
    own = newest_checkpoint(config.logging.run_dir / "checkpoints")
    if own is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"from_": own})})


def tokenizer_size(config: Config) -> int | None:
    """Ids of the tokenizer, data.special_tokens included; None where its files are missing."""
    if not _has_tokenizer(config):
        return None
    return load_tokenizer(config.data.tokenizer, config.data.special_tokens).vocab_size


def _has_tokenizer(config: Config) -> bool:
    return any((config.data.tokenizer / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def _stored_model(config: Config) -> ModelConfig | None:
    """The model as its files (or model.hf_config) describe it, before special tokens are added; None without files."""
    from_ = config.model.from_
    if from_ is None:
        assert config.model.hf_config is not None  # the schema demands one of the two
        size = None
        if config.model.hf_config.get("vocab_size") is None:
            if not _has_tokenizer(config):
                return None  # it says how many tokens there are
            size = load_tokenizer(config.data.tokenizer).vocab_size
        return random_model_config(config.model.hf_config, size)
    if not from_.is_dir():
        return None
    from meditron_train.checkpoint.hf.read import is_hf_directory
    from meditron_train.checkpoint.sharded.read import ShardedSource, is_sharded_directory

    if is_sharded_directory(from_):
        return ShardedSource(from_).model
    return read_hf_config(from_) if is_hf_directory(from_) else None


def _grown(config: Config, stored: ModelConfig, vocab_size: int) -> BaseModel:
    num_new, from_ = vocab_size - stored.vocab_size, config.model.from_
    if num_new and from_ is not None and (from_ / "meta.json").is_file():  # a sharded checkpoint
        raise UserError(
            f"data.special_tokens add {num_new} rows to the embedding, which a start from the sharded checkpoint "
            f"{from_} cannot do. Convert it with `convert megatron-to-hf` and start from that"
        )
    return BaseModel(stored.model_copy(update={"vocab_size": vocab_size}), num_new)
