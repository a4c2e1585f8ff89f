"""Checkpoints of other people's Megatron, seen as sharded checkpoints of ours: same tensor names, same order of rows.

Accepted is the directory of a run (with `latest_checkpointed_iteration.txt`) or of one iteration, in the per-rank
format (`rank_files`) or in `torch_dist`. The model comes from the arguments inside (`args`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from meditron_train.checkpoint.files.stored import Range, Shape
from meditron_train.checkpoint.hf.config import read_hf_config, stated_token_ids
from meditron_train.checkpoint.manifest import MANIFEST_NAME
from meditron_train.checkpoint.megatron.args import (
    CONFIG_HINT,
    Conventions,
    conventions_of,
    is_megatron_llm,
    model_from_args,
)
from meditron_train.checkpoint.megatron.bridge import read_run_config
from meditron_train.checkpoint.megatron.known_args import check_args
from meditron_train.checkpoint.megatron.rank_files import (
    LegacyTensors,
    rank_directories,
)
from meditron_train.checkpoint.megatron.torch_dist import (
    MODEL_PARTS,
    RenamedTensors,
    check_format,
    load_common,
    renamed,
)
from meditron_train.checkpoint.sharded.torch_dist import TorchDistTensors
from meditron_train.checkpoint.tensor_map import TensorSpec, tensor_specs
from meditron_train.checkpoint.tied_head import same_values
from meditron_train.config.model_config import ModelConfig, RopeConfig
from meditron_train.errors import UserError
from meditron_train.files import read_whole
from meditron_train.tokenizer.files import has_tokenizer
from meditron_train.tokenizer.reading import Reading, read_tokenizer

_MAX_TRACKER_BYTES = 1 << 10
_WEIGHTS = "weights"
_NEMO = Path("context", "nemo_tokenizer")
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class MegatronOptions:
    """What the user adds to what the checkpoint says.

    Attributes:
        tokenizer: directory with the tokenizer.
        config: Hugging Face directory whose config.json describes the model, in place of the arguments.
        vocab_size: without padding.
        rotary: how query and key rows are ordered; auto: as the program that wrote the checkpoint does today.
        padded_vocabulary: where nothing says how many tokens there are, take all rows, padding included: to
            look at a checkpoint, not to convert it.
        other: a model that this one is compared with. It decides what the arguments do not: special token ids,
            how RoPE was scaled, and everything where there are none.
        rope_as_stated: RoPE was scaled by what the arguments state, though they do not decide it: to look at a
            checkpoint, not to convert it.
    """

    tokenizer: Path | None = None
    config: Path | None = None
    vocab_size: int | None = None
    rotary: Literal["auto", "half", "interleaved"] = "auto"
    padded_vocabulary: bool = False
    other: ModelConfig | None = None
    rope_as_stated: bool = False


class MegatronSource:
    """The model tensors of another program's checkpoint, named and ordered as in a sharded checkpoint of ours.

    Attributes:
        model, padded_vocab_size, names, place, shape, dtype, read: as of `ShardedSource`.
        tokenizer: the one of the options, or `own_tokenizer`.
        own_tokenizer: the one that lies in the checkpoint.
        iteration: as the checkpoint says.
        layout: tensor and pipeline sizes it was written under, where known.

    Raises:
        UserError: the directory is not a checkpoint, is damaged, or an option is missing that would say what
            the checkpoint does not.
    """

    def __init__(self, directory: str | Path, options: MegatronOptions | None = None) -> None:
        options = options or MegatronOptions()
        self.directory = find_iteration(Path(directory))
        self.own_tokenizer = tokenizer_beside(Path(directory), self.directory)
        if options.tokenizer is None:
            options = replace(options, tokenizer=self.own_tokenizer)
        self.tokenizer = options.tokenizer
        self.layout: dict[str, int] = {}
        if rank_directories(self.directory):
            tensors = LegacyTensors(self.directory)
            args, self.iteration = tensors.args, tensors.iteration
            self.layout = {"tensor": tensors.num_tensor_ranks, "pipeline": tensors.num_stages}
            self._tensors: LegacyTensors | RenamedTensors = tensors
        else:
            check_format(self.directory)
            common = load_common(self.directory)
            args, self.iteration = common.args or read_run_config(self.directory), common.iteration
            self._tensors = renamed(TorchDistTensors(self.directory, read_once=True))
        self.args = args
        where = str(self.directory)
        without_args = not args and isinstance(self._tensors, LegacyTensors) and self._tensors.has_lm_head
        megatron_llm = is_megatron_llm(args) or without_args
        self.conventions = conventions_of(args, megatron_llm=megatron_llm)
        if options.rotary != "auto":
            self.conventions = Conventions(self.conventions.gate_first, options.rotary == "interleaved")
        if isinstance(self._tensors, LegacyTensors):
            self._tensors.gate_first = self.conventions.gate_first
        embedding = "embedding.word_embeddings.weight"
        stored = set(self._tensors.names)
        self.padded_vocab_size = self._tensors.shape(embedding)[0] if embedding in stored else 0
        if options.padded_vocabulary and not args.get("vocab_size") and options.tokenizer is None:
            options = replace(options, vocab_size=self.padded_vocab_size)
        self.model = _model(args, options, self._any_dtype(where), where)
        self._specs = {spec.name: spec for spec in tensor_specs(self.model)}
        if problems := self.problems():
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise UserError(
                f"{where} does not hold the model that its arguments (or --config) describe: {shown}"
            )
        tied = self.model.tie_embeddings and "output_layer.weight" in stored
        if tied and not same_values(self._tensors, "output_layer.weight", embedding, self.model.vocab_size):
            raise UserError(
                f"{where}: the arguments tie the output layer to the embedding, but the output_layer.weight that is "
                f"stored has other values. {CONFIG_HINT}, with the right tie_word_embeddings"
            )

    @property
    def names(self) -> list[str]:
        return list(self._specs)

    def place(self, name: str) -> list[str]:
        return self._tensors.place(name)

    def shape(self, name: str) -> Shape:
        return self._tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(name)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """Rows [start, stop) of the tensor, or all (CPU, vocabulary padded). May be called from several threads."""
        spec = self._specs[name]
        if spec.kind != "qkv" or not self.conventions.interleaved_rotary:
            return self._tensors.read(name, rows)
        return self._read_rotated(spec, rows or (0, spec.shape[0]))

    def problems(self) -> list[str]:
        """What keeps the model from being read, one line each. No tensor is read for it."""
        problems = self._tensors.problems() if isinstance(self._tensors, RenamedTensors) else []
        stored = set(self._tensors.names)
        for spec in self._specs.values():
            shape = spec.padded_shape(self.padded_vocab_size)
            if spec.name not in stored:
                problems.append(f"{spec.name} is missing")
            elif self.shape(spec.name) != shape:
                found = list(self.shape(spec.name))
                problems.append(f"{spec.name} has shape {found}, the model's is {list(shape)}")
        if self.padded_vocab_size and self.padded_vocab_size < self.model.vocab_size:
            rows = f"{self.padded_vocab_size} rows of the embedding"
            problems.append(f"{rows} are fewer than the vocabulary's {self.model.vocab_size}")
        extra = sorted(name for name in stored - set(self._specs) if name.startswith(MODEL_PARTS))
        if self.model.tie_embeddings:  # a copy of the embedding on the last stage
            extra = [name for name in extra if name != "output_layer.weight"]
        problems += [f"{name} does not belong to a model of this kind" for name in extra]
        return problems

    def _read_rotated(self, spec: TensorSpec, rows: Range) -> torch.Tensor:
        """Rows whose queries and keys are in the order of transformers: of each head first the even channels, then
        the odd ones."""
        size, per_group = self.model.head_dim, self.model.num_heads // self.model.num_kv_heads + 2
        first, last = rows[0] // size, -(-rows[1] // size)  # whole heads
        heads = self._tensors.read(spec.name, (first * size, last * size))
        heads = heads.view(last - first, size, *heads.shape[1:])
        turned = torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1)
        for head in range(first, last):
            if head % per_group == per_group - 1:  # a value head
                turned[head - first] = heads[head - first]
        return turned.view(-1, *heads.shape[2:])[rows[0] - first * size : rows[1] - first * size]

    def _any_dtype(self, where: str) -> str:
        for name in self._tensors.names:
            if name.startswith(MODEL_PARTS):
                return str(self._tensors.dtype(name)).removeprefix("torch.")
        raise UserError(f"{where} holds no tensors of a language model")


def is_megatron_directory(directory: str | Path) -> bool:
    """Whether the directory looks like a checkpoint of another Megatron: a run, or one iteration of either format."""
    directory = Path(directory)
    if (directory / "meta.json").is_file():
        return False  # ours
    if (directory / TRACKER).is_file() or rank_directories(directory):
        return True  # also what is written here for Megatron-LM, which has a manifest
    if (directory / MANIFEST_NAME).is_file():
        return False
    inside = directory / _WEIGHTS if (directory / _WEIGHTS / ".metadata").is_file() else directory
    # ours lacks these only when it was never finished, and then its name says so
    return directory.suffix != ".tmp" and any(
        (inside / name).is_file() for name in (".metadata", "metadata.json")
    )


def find_iteration(directory: Path) -> Path:
    """The directory of an iteration: of a run, the newest one. NeMo keeps the tensors in a directory inside.

    Raises:
        UserError: the tracker file cannot be read, or names an iteration that is not there.
    """
    tracker = directory / TRACKER
    if not tracker.is_file():
        inside = directory / _WEIGHTS
        return inside if (inside / ".metadata").is_file() else directory
    try:
        text = read_whole(tracker, _MAX_TRACKER_BYTES).decode("utf-8", "replace").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{tracker} cannot be read: {error}. Name the iteration's directory") from None
    if text != "release" and not re.fullmatch("[0-9]{1,12}", text):
        raise UserError(
            f"{tracker} says {text[:50]!r}, neither a number nor release. Name the iteration's directory"
        )
    found = directory / (text if text == "release" else f"iter_{int(text):07d}")
    if not found.is_dir():
        others = sorted(path.name for path in directory.glob("iter_*"))
        hint = f" There are: {', '.join(others[-3:])}." if others else ""
        raise UserError(f"{tracker} says {text}, but {found} does not exist.{hint}")
    return found


def tokenizer_beside(directory: Path, iteration: Path) -> Path | None:
    """Where the tokenizer of a run or an iteration lies; Megatron-Bridge's and NeMo's have directories of their own."""
    places = (
        directory,
        iteration,
        iteration / "tokenizer",
        directory / "tokenizer",
        _nemo_root(iteration) / _NEMO,
    )
    return next(filter(has_tokenizer, places), None)


def _nemo_root(iteration: Path) -> Path:
    return iteration.parent if iteration.name == _WEIGHTS else iteration


def _model(args: Mapping[str, Any], options: MegatronOptions, dtype: str, where: str) -> ModelConfig:
    if options.config is not None:
        check_args(args, where, "", described=True)
        model = read_hf_config(options.config)
        return model.model_copy(update={"dtype": dtype, "vocab_size": options.vocab_size or model.vocab_size})
    if not args and options.other is not None:
        return options.other.model_copy(update={"dtype": dtype})
    if not args:
        raise UserError(f"{where}: the checkpoint holds no arguments that describe the model. {CONFIG_HINT}")
    vocab_size: int | None = options.vocab_size
    ids: dict[str, int | tuple[int, ...] | None] = {}
    if options.tokenizer is not None:
        reading = read_tokenizer(options.tokenizer)
        # Models have rows that no token uses yet, and that belong to them all the same.
        named_size = args.get("vocab_size")
        vocab_size = vocab_size or max(reading.vocab_size, named_size if type(named_size) is int else 0)
        ids = _token_ids(reading, options.tokenizer)
    if options.other is not None:
        ids = {
            name: getattr(options.other, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
    known = options.other.rope if options.other is not None else None
    rope: RopeConfig | Literal["as stated"] | None = "as stated" if options.rope_as_stated else known
    return model_from_args(args, vocab_size, dtype, where, rope).model_copy(update=ids)


def _token_ids(reading: Reading, directory: Path) -> dict[str, int | tuple[int, ...] | None]:
    """The ids that the arguments do not say: those of the model's config.json beside the tokenizer, else the
    tokenizer's own.

    What is not said of padding means none: transformers does not train the embedding of pad_token_id, and a tokenizer
    may pad with the token that ends a text.
    """
    own = {f"{name}_id": reading.id_of(name) for name in ("bos_token", "eos_token", "pad_token")}
    stated = stated_token_ids(directory)
    if stated or own["pad_token_id"] in (own["bos_token_id"], own["eos_token_id"]):
        own["pad_token_id"] = None
    return {**{name: number for name, number in own.items() if number is not None}, **stated}
