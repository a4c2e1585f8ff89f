"""Checkpoints of other people's Megatron, seen as sharded checkpoints of ours: same tensor names, same order of rows.

Accepted is the directory of a run (with `latest_checkpointed_iteration.txt`) or of one iteration, in the per-rank
format (`foreign_legacy`) or in `torch_dist`. The model comes from the arguments inside (`foreign_args`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from meditron_train.checkpoint.foreign_args import (
    CONFIG_HINT,
    Conventions,
    conventions_of,
    is_megatron_llm,
    model_from_args,
)
from meditron_train.checkpoint.foreign_legacy import (
    LegacyTensors,
    common_name,
    load_foreign_pickle,
    rank_directories,
)
from meditron_train.checkpoint.hf_config import read_hf_config
from meditron_train.checkpoint.hf_map import TensorSpec, tensor_specs
from meditron_train.checkpoint.stored import Range, Shape
from meditron_train.checkpoint.tokenizer_files import has_tokenizer, named_tokens, vocabularies
from meditron_train.checkpoint.torch_dist import TorchDistTensors
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class ForeignOptions:
    """What the user adds to what the checkpoint says.

    tokenizer: directory with the tokenizer. config: Hugging Face directory whose config.json describes the model, in
    place of the arguments. vocab_size: without padding. rotary: how query and key rows are ordered; auto: as the
    program that wrote the checkpoint does today. padded_vocabulary: where nothing says how many tokens there are, take
    all rows, padding included: to look at a checkpoint, not to convert it.
    """

    tokenizer: Path | None = None
    config: Path | None = None
    vocab_size: int | None = None
    rotary: Literal["auto", "half", "interleaved"] = "auto"
    padded_vocabulary: bool = False


class _Tensors(Protocol):
    """Tensors under megatron-core's names."""

    @property
    def names(self) -> list[str]: ...

    def place(self, name: str) -> list[str]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor: ...


class ForeignSource:
    """The model tensors of another program's checkpoint, named and ordered as in a sharded checkpoint of ours.

    model, padded_vocab_size, names, place, shape, dtype and read are those of `MegatronSource`. tokenizer: the one of
    the options, or one that lies beside the tracker file. iteration: as the checkpoint says. layout: tensor and
    pipeline sizes it was written under, where known. Raises UserError when the
    directory is none, is damaged, or when an option is missing that would tell what the checkpoint does not.
    """

    def __init__(self, directory: str | Path, options: ForeignOptions | None = None) -> None:
        options = options or ForeignOptions()
        if options.tokenizer is None and has_tokenizer(directory):
            options = replace(options, tokenizer=Path(directory))
        self.tokenizer = options.tokenizer
        self.directory = find_iteration(Path(directory))
        self.layout: dict[str, int] = {}
        if rank_directories(self.directory):
            tensors = LegacyTensors(self.directory)
            args, self.iteration = tensors.args, tensors.iteration
            self.layout = {"tensor": tensors.num_tensor_ranks, "pipeline": tensors.num_stages}
            self._tensors: _Tensors = tensors
        else:
            common = load_common(self.directory)
            args, self.iteration = common.args, common.iteration
            self._tensors = _renamed(TorchDistTensors(self.directory, read_once=True))
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
                f"{where} does not hold the model that its arguments (or --config) describe: {shown}."
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
        problems = self._tensors.problems() if isinstance(self._tensors, _RenamedTensors) else []
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
        extra = sorted(name for name in stored - set(self._specs) if name.startswith(_MODEL_PARTS))
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
            if name.startswith(_MODEL_PARTS):
                return str(self._tensors.dtype(name)).removeprefix("torch.")
        raise UserError(f"{where} holds no tensors of a language model.")


_MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class CommonState:
    """What a `torch_dist` checkpoint keeps in common.pt beside the tensors."""

    args: dict[str, Any]
    iteration: Any
    content: dict[str, Any]


def load_common(directory: Path) -> CommonState:
    """Read common.pt. UserError when it is missing, damaged, or could run code."""
    path = directory / "common.pt"
    if not path.is_file():
        raise UserError(f"{path} is missing: the checkpoint is not complete.")
    content = load_foreign_pickle(path)
    content = content if isinstance(content, dict) else {}
    args = content.get("args")
    return CommonState(
        dict(vars(args)) if hasattr(args, "__dict__") else {}, content.get("iteration"), content
    )


def is_foreign_directory(directory: str | Path) -> bool:
    """Whether the directory looks like a checkpoint of another Megatron: a run, or one iteration of either format."""
    directory = Path(directory)
    if (directory / "meta.json").is_file() or (directory / "hf").is_dir():
        return False  # ours
    if (directory / TRACKER).is_file() or rank_directories(directory):
        return True
    return (directory / ".metadata").is_file() and (directory / "common.pt").is_file()


def find_iteration(directory: Path) -> Path:
    """The directory of the newest iteration, from that of a run; a directory of an iteration is given back."""
    tracker = directory / TRACKER
    if not tracker.is_file():
        return directory
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not text.isdigit():
        raise UserError(
            f"{tracker} says {text[:50]!r}, neither a number nor release. Name the iteration's directory."
        )
    found = directory / (text if text == "release" else f"iter_{int(text):07d}")
    if not found.is_dir():
        others = sorted(path.name for path in directory.glob("iter_*"))
        hint = f" There are: {', '.join(others[-3:])}." if others else ""
        raise UserError(f"{tracker} says {text}, but {found} does not exist.{hint}")
    return found


def _model(args: Mapping[str, Any], options: ForeignOptions, dtype: str, where: str) -> ModelConfig:
    if options.config is not None:
        model = read_hf_config(options.config)
        return model.model_copy(update={"dtype": dtype, "vocab_size": options.vocab_size or model.vocab_size})
    if not args:
        raise UserError(f"{where}: the checkpoint holds no arguments that describe the model. {CONFIG_HINT}.")
    vocab_size: int | None = options.vocab_size
    ids: dict[str, int] = {}
    if options.tokenizer is not None:
        known = vocabularies(options.tokenizer)
        if not known:
            raise UserError(f"{options.tokenizer} holds no tokenizer (tokenizer.model or tokenizer.json).")
        tokens = {token: number for vocabulary in known.values() for token, number in vocabulary.items()}
        vocab_size = vocab_size or 1 + max(tokens.values())
        named = named_tokens(options.tokenizer)
        names = (("bos_token_id", "bos_token"), ("eos_token_id", "eos_token"), ("pad_token_id", "pad_token"))
        ids = {key: tokens[named[name]] for key, name in names if named.get(name) in tokens}
    return model_from_args(args, vocab_size, dtype, where).model_copy(update=ids)


class _RenamedTensors:
    """Tensors of a `torch_dist` checkpoint under megatron-core's local names."""

    def __init__(self, tensors: TorchDistTensors, stored_name: Mapping[str, str]) -> None:
        self._tensors, self._stored_name = tensors, stored_name

    @property
    def names(self) -> list[str]:
        return list(self._stored_name)

    def problems(self) -> list[str]:
        return self._tensors.problems()

    def place(self, name: str) -> list[str]:
        return self._tensors.place(self._stored_name[name]) if name in self._stored_name else []

    def shape(self, name: str) -> Shape:
        return self._tensors.shape(self._stored_name.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors.dtype(self._stored_name.get(name, name))

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        return self._tensors.read(self._stored_name.get(name, name), rows)


def _renamed(tensors: TorchDistTensors) -> _RenamedTensors:
    stored_name = {}
    for name in tensors.names:
        # Some programs put "model." or "module." before every name.
        common = common_name(name.removeprefix("model."))
        if common is not None and common.startswith(_MODEL_PARTS):
            stored_name[common] = name
    return _RenamedTensors(tensors, stored_name)
