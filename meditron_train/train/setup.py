"""From a configuration to everything the loop needs; all that can be wrong is found before ranks connect."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

from meditron_train.checkpoint.hf_config import model_config_from_hf, read_hf_config
from meditron_train.checkpoint.hf_map import TensorSource
from meditron_train.checkpoint.hf_read import is_hf_directory, open_hf_model
from meditron_train.checkpoint.manifest import require_intact
from meditron_train.checkpoint.megatron_read import MegatronSource, is_megatron_directory
from meditron_train.checkpoint.sharded import load_sharded
from meditron_train.checkpoint.tokenizer_files import copy_tokenizer
from meditron_train.checkpoint.weight_sources import GrownVocabulary, RandomSource
from meditron_train.config.check import check_config
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.data.packed import PackedDataset, build_train_dataset, build_validation_datasets
from meditron_train.data.tokenizer import load_tokenizer
from meditron_train.errors import UserError
from meditron_train.layout import ParallelLayout
from meditron_train.log import get_logger
from meditron_train.parallel import Mesh
from meditron_train.train.engine import Engine

_log = get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run will do, checked: the model to train and the data it reads.

    Attributes:
        num_new_tokens: rows that data.special_tokens add to the embedding.
    """

    config: Config
    model: ModelConfig
    num_new_tokens: int
    layout: ParallelLayout
    train_data: PackedDataset
    validation_data: dict[str, PackedDataset]

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory, over all tensor-parallel ranks."""
        return self.model.padded_vocab_size(self.layout.tensor, self.config.parallel.vocab_multiple)


def make_plan(config: Config, world_size: int) -> Plan:
    """Read the model's and the data's descriptions and check everything against everything.

    Raises:
        UserError: every mistake of the configuration in one message; a model or dataset that is not what it
            should be.
    """
    stored = _stored_model(config)
    if stored is None:
        check_config(config, None, world_size)
        raise UserError(
            f"model.from: {config.model.from_} is neither a Hugging Face model nor one of our checkpoints"
        )
    model, tokenizer_size = _with_special_tokens(config, stored)
    check_config(config, model, world_size, tokenizer_vocab_size=tokenizer_size)
    # What a run would meet only later, on one rank or at its first checkpoint:
    from_ = config.model.from_
    if from_ is not None and is_megatron_directory(from_):
        # Every rank sees missing and cut off files; one is enough to read all of them.
        require_intact(from_, check_hashes=os.environ.get("RANK", "0") == "0")
    elif from_ is not None and is_hf_directory(from_):
        open_hf_model(from_)
    with tempfile.TemporaryDirectory() as scratch:
        copy_tokenizer(config.data.tokenizer, scratch, config.data.special_tokens)
    return Plan(
        config=config,
        model=model,
        num_new_tokens=model.vocab_size - stored.vocab_size,
        layout=config.parallel.layout(world_size),
        train_data=build_train_dataset(config.data, config.train.seq_len),
        validation_data=build_validation_datasets(config.data, config.train.seq_len),
    )


def build_engine(plan: Plan, mesh: Mesh, *, with_weights: bool) -> Engine:
    """The engine, with its initial weights unless a checkpoint of the run is going to give them; collective."""
    if not with_weights:
        return Engine(plan.config, plan.model, mesh, None)
    from_ = plan.config.model.from_
    if from_ is None:
        return Engine(plan.config, plan.model, mesh, RandomSource(plan.model, plan.config.train.seed))
    if is_megatron_directory(from_):
        engine = Engine(plan.config, plan.model, mesh, None)
        engine.load_state(load_sharded(engine.sharded_state(with_optimizer=False, is_loading=True), from_))
        return engine
    source: TensorSource = open_hf_model(from_)[1]
    if plan.num_new_tokens:
        _log.info(
            "%d tokens are new to the model: their embeddings start as the mean of all", plan.num_new_tokens
        )
        source = GrownVocabulary(source, plan.model.vocab_size)
    return Engine(plan.config, plan.model, mesh, source)


def _stored_model(config: Config) -> ModelConfig | None:
    """The model as its files (or model.hf_config) describe it, before special tokens are added; None without files."""
    from_ = config.model.from_
    if from_ is None:
        assert config.model.hf_config is not None
        return model_config_from_hf(dict(config.model.hf_config), where="model.hf_config")
    if is_megatron_directory(from_):
        return MegatronSource(from_).model
    return read_hf_config(from_) if is_hf_directory(from_) else None


def _with_special_tokens(config: Config, stored: ModelConfig) -> tuple[ModelConfig, int | None]:
    """The model with its vocabulary grown by data.special_tokens, and the size of the tokenizer (None: missing).

    A tokenizer that is too large by itself does not grow the model: `check_config` reports it.
    """
    directory, added = config.data.tokenizer, config.data.special_tokens
    if not directory.is_dir():
        return stored, None
    size = load_tokenizer(directory, added).vocab_size
    base_size = load_tokenizer(directory).vocab_size if added else size
    if base_size > stored.vocab_size or size <= stored.vocab_size:
        return stored, size
    if config.model.from_ is not None and is_megatron_directory(config.model.from_):
        raise UserError(
            f"data.special_tokens add {size - stored.vocab_size} rows to the embedding, which a start from the sharded "
            f"checkpoint {config.model.from_} cannot do. Convert it with `convert megatron-to-hf` and start from that"
        )
    return stored.model_copy(update={"vocab_size": size}), size
