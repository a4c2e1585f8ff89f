"""From a configuration to everything the loop needs; all that can be wrong is found before ranks connect."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from meditron_train.checkpoint.base_weights import open_base, weights_sha256
from meditron_train.checkpoint.hf.directory import write_hf_files
from meditron_train.checkpoint.hf.read import is_hf_directory, open_hf_model
from meditron_train.checkpoint.manifest import require_intact
from meditron_train.checkpoint.sharded.ranks import load_sharded
from meditron_train.checkpoint.sharded.read import is_sharded_directory
from meditron_train.checkpoint.tensor_map import TensorSource
from meditron_train.checkpoint.tokenizer.chat import ChatFormat
from meditron_train.checkpoint.weight_sources import GrownVocabulary, RandomSource
from meditron_train.config.chat import CHATML_TOKENS
from meditron_train.config.check import check_config
from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.data.packed import PackedDataset, build_validation_datasets
from meditron_train.data.sources import vocabulary
from meditron_train.errors import UserError
from meditron_train.layout import ParallelLayout
from meditron_train.log import get_logger
from meditron_train.parallel import Mesh
from meditron_train.train.base_model import resolve_base_model, tokenizer_size, with_a_base
from meditron_train.train.chain_held_out import warn_of_earlier_held_out
from meditron_train.train.engine import Engine
from meditron_train.train.engine_state import load_state, sharded_base
from meditron_train.train.length import open_train_data, resolve_steps, warn_of_other_budget
from meditron_train.train.validation_tasks import ValidationTask, read_validation_tasks

_log = get_logger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run will do, checked: the model to train and the data it reads.

    Attributes:
        num_new_tokens: rows that data.special_tokens add to the embedding.
        chat: what data.chat adds to the exported model; None: nothing.
        base_sha256: with adapters, the hash of the weights they belong to; on rank 0 alone, which reads them all.
    """

    config: Config
    model: ModelConfig
    num_new_tokens: int
    layout: ParallelLayout
    train_data: PackedDataset
    validation_data: dict[str, PackedDataset]
    validation_tasks: tuple[ValidationTask, ...]
    chat: ChatFormat | None = None
    base_sha256: str | None = None

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory, over all tensor-parallel ranks."""
        return self.model.padded_vocab_size(self.layout.tensor, self.config.parallel.vocab_multiple)


def make_plan(config: Config, world_size: int, rank: int) -> Plan:
    """Read the model's and the data's descriptions and check everything against everything.

    Rank 0 alone reads a whole checkpoint to check its hashes; every rank sees missing and truncated files.

    Raises:
        UserError: every mistake of the configuration in one message; a model or dataset that is not what it
            should be.
    """
    asked, train_data = resolve_steps(config)
    config = with_a_base(asked)
    if config.model.from_ != asked.model.from_:
        _log.warning(
            "model.from: %s no longer exists; the run continues from its own checkpoint", asked.model.from_
        )
    base = resolve_base_model(config)
    if base is None:
        check_config(config, None, world_size)
        raise UserError(
            f"model.from: {config.model.from_} is neither a Hugging Face model nor one of our checkpoints"
        )
    check_config(config, base.model, world_size, tokenizer_vocab_size=tokenizer_size(config))
    # What a run would meet only later, on one rank or at its first checkpoint:
    from_ = config.model.from_
    if from_ is not None and is_sharded_directory(from_):
        require_intact(from_, check_hashes=rank == 0)
    elif from_ is not None and is_hf_directory(from_):
        open_hf_model(from_)
    chat = _chat_format(config)
    base_sha256 = None
    if config.lora is not None:
        if base.num_new_tokens:
            raise UserError(
                f"data.special_tokens add {base.num_new_tokens} rows to the embedding, which an adapter does not hold. "
                "Extend the base first with `meditron-train convert add-tokens`, and name the result in model.from and "
                "data.tokenizer"
            )
        if rank == 0 and from_ is not None:
            base_sha256 = weights_sha256(open_base(from_))
    if rank == 0:  # the one that exports
        with tempfile.TemporaryDirectory() as scratch:
            write_hf_files(Path(scratch), base.model, config.data.tokenizer, config.data.special_tokens, chat)
    if train_data is None:
        train_data = open_train_data(config)
    warn_of_other_budget(config, train_data)
    if rank == 0:
        warn_of_earlier_held_out(config)
    return Plan(
        config=asked,
        model=base.model,
        num_new_tokens=base.num_new_tokens,
        layout=config.parallel.layout(world_size),
        train_data=train_data,
        validation_data=build_validation_datasets(config.data, config.train.seq_len, vocabulary(config.data)),
        validation_tasks=read_validation_tasks(config, base.model.max_position_embeddings),
        chat=chat,
        base_sha256=base_sha256,
    )


def _chat_format(config: Config) -> ChatFormat | None:
    """What an export gets besides the tokenizer's own: a template that the tokenizer brings is there already."""
    if config.data.chat is None or config.data.chat.template != "chatml":
        return None
    template = vocabulary(config.data).chat_template
    assert template is not None
    return ChatFormat(template.source, CHATML_TOKENS[1])


def build_engine(plan: Plan, mesh: Mesh, *, with_weights: bool) -> Engine:
    """The engine, with its initial weights unless a checkpoint of the run is going to give them (all of them: with
    adapters it gives those alone); collective.

    Raises:
        UserError: the initial weights are not finite: the first export would refuse them.
    """
    if not with_weights and plan.config.lora is None:
        return Engine(plan.config, plan.model, mesh, None)
    engine = _engine_with_weights(plan, mesh)
    if not plan.config.model.allow_nonfinite:
        _require_finite(engine, mesh)
    return engine


def _engine_with_weights(plan: Plan, mesh: Mesh) -> Engine:
    from_ = plan.config.model.from_
    if from_ is None:
        return Engine(plan.config, plan.model, mesh, RandomSource(plan.model, plan.config.train.seed))
    if is_sharded_directory(from_):
        engine = Engine(plan.config, plan.model, mesh, None)
        load_state(engine, load_sharded(sharded_base(engine), from_))
        return engine
    source: TensorSource = open_hf_model(from_)[1]
    if plan.num_new_tokens:
        _log.info(
            "%d tokens are new to the model: their embeddings start as the mean of all", plan.num_new_tokens
        )
        source = GrownVocabulary(source, plan.model.vocab_size)
    return Engine(plan.config, plan.model, mesh, source)


def _require_finite(engine: Engine, mesh: Mesh) -> None:
    """Every rank looks at its own part of the weights; the message is the same on all."""
    mine = []
    for virtual_rank, chunk in enumerate(engine.chunks):
        parameters = dict(chunk.named_parameters())
        for local, name in engine.global_names(virtual_rank).items():
            low, high = torch.aminmax(parameters[local].detach())  # both are NaN where any value is
            if not (math.isfinite(low) and math.isfinite(high)):
                mine.append(name)
    names = sorted({name for of_rank in mesh.gather_objects(mine) for name in of_rank})
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(
            f"model.from: {engine.config.model.from_} holds NaN or infinity in {', '.join(names[:5])}{more}. "
            "`meditron-train convert inspect` says where. Start from an intact model, or set model.allow_nonfinite=true"
        )
