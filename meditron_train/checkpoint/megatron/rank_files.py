"""Read the per-rank checkpoints of Megatron-LM (`--ckpt-format torch`) and Megatron-LLM, by tensors and rows.

    iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt       one file per tensor- and pipeline-parallel rank

A file is one pickle of the model's part under that program's names, the arguments, and often the optimizer. It is
read as data: what is neither a tensor nor a known object is refused by name, and known objects are inert. Layers are
numbered from 0 in every stage.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.files.pickled import Allowed, ForbiddenGlobal, Opaque, opaque, shown
from meditron_train.checkpoint.files.stored import Range, Shape, StoredTensor, read_stored
from meditron_train.checkpoint.files.torch_file import find_tensors
from meditron_train.errors import UserError
from meditron_train.files import open_regular
from meditron_train.layout import split_dim

FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt")  # the second: Megatron-LLM with a distributed optimizer
_MAX_RANKS = 1 << 20
_MAX_DEPTH = 8  # of nested modules
_MAX_ENTRIES = 200_000  # in the nested modules of a file
_MAX_NAME_CHARACTERS = 1000
_RANK_DIRECTORY = re.compile(r"mp_rank_([0-9]{2,6})(?:_([0-9]{3,6}))?")

# Old names of the module tree -> megatron-core's, which ours are.
_RENAMED = (
    (re.compile(r"^(?:module\.)+"), ""),
    (re.compile(r"^language_model\."), ""),
    (re.compile(r"^(?:encoder|transformer)\."), "decoder."),
    (re.compile(r"\.(?:self_)?attention\.query_key_value\."), ".self_attention.linear_qkv."),
    (re.compile(r"\.(?:self_)?attention\.dense\."), ".self_attention.linear_proj."),
    (re.compile(r"\.mlp\.dense_h_to_4h\."), ".mlp.linear_fc1."),
    (re.compile(r"\.mlp\.dense_4h_to_h\."), ".mlp.linear_fc2."),
    (re.compile(r"\.input_norm\."), ".input_layernorm."),
    (re.compile(r"\.post_attention_(?:layer)?norm\."), ".pre_mlp_layernorm."),
    (re.compile(r"\.final_norm\."), ".final_layernorm."),
    (re.compile(r"^lm_head(?:\.weight)?$"), "output_layer.weight"),
    # Transformer Engine keeps a norm in the linear layer behind it.
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_"), ".input_layernorm."),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_"), ".pre_mlp_layernorm."),
)
_IGNORED = re.compile(r"(_extra_state.*|rotary_(pos_)?emb\.inv_freq|^word_embeddings_for_head\.weight)$")


def common_name(name: str) -> str | None:
    """megatron-core's name of a tensor under any program's name; None for what carries no weights."""
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return None if _IGNORED.search(name) else name


class RankFile:
    """One rank's file: the whole of its content, with a StoredTensor for every tensor. No tensor data is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = load_megatron_pickle(path)
        if not isinstance(content, dict):
            raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint of Megatron")
        self.content: dict[str, Any] = content
        names = [name for name in content if type(name) is str and re.fullmatch(r"model[0-9]{0,4}", name)]
        # model0, model1, ... are the chunks of an interleaved pipeline
        names.sort(key=lambda name: int(name[5:] or 0))
        flatten = _Flattening(path)
        self.chunks = [dict(flatten(content[name])) for name in names]

    @property
    def args(self) -> dict[str, Any]:
        """The arguments as a dict; empty when the file has none."""
        return attributes(self.content.get("args"))

    @property
    def iteration(self) -> int | None:
        return iteration_of(self.content)


@dataclass(frozen=True)
class _Part:
    """A tensor of one tensor-parallel rank."""

    path: Path
    tensor: StoredTensor


class LegacyTensors:
    """The model's tensors under megatron-core's names, global layer numbers, joined over tensor-parallel ranks.

    Opening reads the pickles of all files, no tensor. gate_first must be set before a joint gate and up
    matrix is read.

    Attributes:
        args: the arguments of rank 0.
        num_tensor_ranks, num_stages: the layout found.
        has_lm_head: the output layer has Megatron-LLM's name.

    Raises:
        UserError: missing ranks, damaged files, pickles with code, or an old order of query, key and value.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _open_files(directory)
        self.num_tensor_ranks = 1 + max(rank for rank, _ in self.files)
        self.num_stages = 1 + max(stage for _, stage in self.files)
        first = self.files[0, 0]
        self.args = first.args
        self.iteration = first.iteration
        version = first.content.get("checkpoint_version", 0)
        if isinstance(version, int | float) and version < 2.0:
            raise UserError(
                f"{first.path}: checkpoint_version {version} orders query, key and value otherwise; 2.0 and newer are "
                f"supported. Load and save it once with the program that wrote it"
            )
        originals = (name for file in self.files.values() for chunk in file.chunks for name in chunk)
        self.has_lm_head = any("lm_head" in name.split(".") for name in originals)
        self.gate_first = True
        self._parts = self._join()

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    def place(self, name: str) -> list[str]:
        parts = self._parts.get(name, [])
        return sorted({str(part.path.relative_to(self.directory)) for part in parts})

    def dtype(self, name: str) -> torch.dtype:
        return self._parts_of(name)[0].tensor.dtype

    def shape(self, name: str) -> Shape:
        """Of the whole tensor, as stored: vocabulary padded."""
        parts, split = self._parts_of(name), split_dim(name)
        shape = list(parts[0].tensor.shape)
        if split is not None:
            shape[split] = sum(part.tensor.shape[split] for part in parts)
        return tuple(shape)

    def read(self, name: str, rows: Range | None = None) -> torch.Tensor:
        """Rows [start, stop) of the whole tensor, or all. May be called from several threads."""
        parts, split = self._parts_of(name), split_dim(name)
        if split is None:
            return self._read(name, parts[0], rows)
        if split == 1:
            return torch.cat([self._read(name, part, rows) for part in parts], dim=1)
        start, stop = rows or (0, self.shape(name)[0])
        found, position = [], 0
        for part, first, num_rows in self._row_runs(name, parts):
            begin, end = max(start, position), min(stop, position + num_rows)
            if begin < end:
                found.append(self._read(name, part, (first + begin - position, first + end - position)))
            position += num_rows
        return torch.cat(found) if len(found) != 1 else found[0]

    def _row_runs(self, name: str, parts: Sequence[_Part]) -> Iterable[tuple[_Part, int, int]]:
        """Runs of rows (part, first row in it, number) that make up the whole tensor, in order."""
        if not name.endswith("mlp.linear_fc1.weight"):
            return [(part, 0, part.tensor.shape[0]) for part in parts]
        # Every rank holds its gate rows and its up rows; the whole tensor is all gate rows, then all up rows.
        halves = [part.tensor.shape[0] // 2 for part in parts]
        gates = [(p, 0 if self.gate_first else half, half) for p, half in zip(parts, halves, strict=True)]
        ups = [(p, half if self.gate_first else 0, half) for p, half in zip(parts, halves, strict=True)]
        return [*gates, *ups]

    def _read(self, name: str, part: _Part, rows: Range | None) -> torch.Tensor:
        return read_stored(part.path, part.tensor, name, rows, read_once=True)

    def _parts_of(self, name: str) -> list[_Part]:
        if name not in self._parts:
            raise UserError(f"{self.directory}: no tensor {name} in the checkpoint")
        return self._parts[name]

    def _join(self) -> dict[str, list[_Part]]:
        """Name -> parts of all tensor-parallel ranks. The chunks of an interleaved pipeline follow each other stage
        after stage: chunk 0 of every stage, then chunk 1 of every stage."""
        joined: dict[str, list[_Part]] = {}
        num_chunks = {len(file.chunks) for file in self.files.values()}
        if len(num_chunks) != 1 or 0 in num_chunks:
            raise UserError(f"{self.directory}: the files do not all hold a model, or not in as many chunks")
        first_layer = 0
        for chunk in range(num_chunks.pop()):
            for stage in range(self.num_stages):
                num_layers = 0
                for rank in range(self.num_tensor_ranks):
                    file = self.files[rank, stage]
                    named, num_layers = _number_layers(file.chunks[chunk], first_layer)
                    for name, tensor in named.items():
                        joined.setdefault(name, []).append(_Part(file.path, tensor))
                first_layer += num_layers
        for name, parts in list(joined.items()):
            # A last stage keeps a copy of a tied embedding; Megatron-LLM calls it by the same name.
            if len(parts) > self.num_tensor_ranks and name == "embedding.word_embeddings.weight":
                joined[name] = parts = parts[: self.num_tensor_ranks]
            if len(parts) != self.num_tensor_ranks:
                raise UserError(
                    f"{self.directory}: {name} is in {len(parts)} of {self.num_tensor_ranks} tensor-parallel ranks"
                )
            _require_alike(name, parts)
        return joined


def _require_alike(name: str, parts: Sequence[_Part]) -> None:
    """Refuse parts of tensor-parallel ranks that cannot be joined: of other dtypes, dimensions or sizes."""
    split, first = split_dim(name), parts[0].tensor
    for part in parts:
        tensor, other = part.tensor, list(first.shape)
        shape = list(tensor.shape)
        can_split = split is None or len(shape) > split
        if split is not None and can_split and len(other) == len(shape):
            other[split] = shape[split]
        is_odd = name.endswith("mlp.linear_fc1.weight") and can_split and shape[0] % 2
        if not can_split or is_odd or (shape, tensor.dtype) != (other, first.dtype):
            raise UserError(
                f"{part.path}: {shown(name)} is {shape} of {tensor.dtype}, which does not go together with "
                f"{list(first.shape)} of {first.dtype} in {parts[0].path}"
            )


def rank_directories(directory: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, stage) -> `mp_rank_TT[_PPP]` below the directory of an iteration."""
    found = {}
    for path in sorted(directory.glob("mp_rank_*")):
        match = _RANK_DIRECTORY.fullmatch(path.name)
        if match and any((path / name).is_file() for name in FILE_NAMES):
            found[int(match[1]), int(match[2] or 0)] = path
    return found


def load_megatron_pickle(path: Path) -> Any:
    """What a torch.save file of Megatron holds, with a StoredTensor for every tensor. Nothing in it is ever run.

    Raises:
        UserError: the file holds something beyond the allow-list; the message names it.
    """
    try:
        with open_regular(path) as file:
            return find_tensors(file.fileno(), also_allowed=OBJECTS)
    except ForbiddenGlobal as error:
        raise UserError(
            f"{path}: the pickle refers to {error}, which a checkpoint of Megatron does not need. Refused, as it could "
            f"run code"
        ) from None
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is not a file of torch 1.6 or newer, or it is cut off. Load and save it once with a newer torch"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). It is truncated or damaged") from None


# Objects in the files that nothing here needs but the arguments' namespace: enums, states of random generators, numpy
# arrays, the state of Transformer Engine. Exact names: a file of another name could run code where it is loaded.
_ENUMS = ("AttnBackend", "AttnMaskType", "AttnType", "LayerType", "ModelType", "PositionEmbeddingType")
_CUDA_GRAPHS = ("CudaGraphModule", "CudaGraphScope", "InferenceCudaGraphScope")
_RERUNS = ("Diagnostic", "Mode", "State", "ValidationStatus")
_RECIPES = ("DelayedScaling", "Float8BlockScaling", "Float8CurrentScaling", "Format", "MXFP8BlockScaling")
_SIGNALS = ("SIGALRM", "SIGCONT", "SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "Signals")
_BUILT_IN = ("bytearray", "bytes", "complex", "frozenset", "getattr", "set", "slice")
_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMBERS = ("Bool", "Float32", "Float64", "Int32", "Int64", "UInt32", "UInt64")
_OBJECTS = (
    # protocol 2 spells the module of built-in names as Python 2 did
    *((module, name) for module in ("builtins", "__builtin__") for name in _BUILT_IN),
    *((module, name) for module in _ARRAYS for name in ("_reconstruct", "scalar")),
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *(("numpy.dtypes", f"{kind}DType") for kind in _NUMBERS),
    *((module, "BytesIO") for module in ("io", "_io")),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("signal", name) for name in _SIGNALS),
    *(("collections", name) for name in ("Counter", "defaultdict")),
    *(("torch", name) for name in ("Generator", "device")),
    ("torch._C", "Generator"),
    ("_codecs", "encode"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    *(
        (f"megatron.{module}", name)
        for module in ("enums", "model.enums", "legacy.model.enums")
        for name in _ENUMS
    ),
    *((f"megatron.core.{module}", name) for module in ("enums", "transformer.enums") for name in _ENUMS),
    *(("megatron.core.enums", name) for name in ("Fp4Recipe", "Fp8Recipe")),
    *(("megatron.core.transformer.enums", name) for name in _CUDA_GRAPHS),
    *(("megatron.core.rerun_state_machine", f"Rerun{kind}") for kind in _RERUNS),
    *(
        (f"megatron.core.{module}", "OptimizerConfig")
        for module in ("optimizer", "optimizer.optimizer_config")
    ),
    *(("transformer_engine.common.recipe", name) for name in _RECIPES),
)
OBJECTS: Allowed = {name: opaque(*name) for name in _OBJECTS}


def attributes(value: Any) -> dict[str, Any]:
    """The attributes of a namespace; empty for anything else."""
    state = value.state if type(value) is Opaque and value.name.endswith("Namespace") else None
    return {name: item for name, item in state.items() if type(name) is str} if type(state) is dict else {}


def iteration_of(content: Mapping[Any, Any]) -> int | None:
    """The iteration that a checkpoint says it is of."""
    found = content.get("iteration")
    return found if type(found) is int else None


class _Flattening:
    """Nested dicts of tensors as dotted names. Dicts may be shared, so that few of them make very many names.

    Args:
        path: the file, for messages.

    Raises:
        UserError: there are more entries, or longer names, than a model has.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, _MAX_ENTRIES

    def __call__(self, value: Any, prefix: str = "", depth: int = 0) -> Iterable[tuple[str, StoredTensor]]:
        if type(value) is dict and depth < _MAX_DEPTH:
            self._left -= len(value)
            if self._left < 0:
                raise UserError(f"{self._path}: more than {_MAX_ENTRIES:,} entries are no model")
            for key, item in value.items():
                if type(key) is not str or len(prefix) + len(key) > _MAX_NAME_CHARACTERS:
                    raise UserError(f"{self._path}: {shown(key)} is no name of a tensor")
                yield from self(item, f"{prefix}.{key}" if prefix else key, depth + 1)
        elif isinstance(value, StoredTensor):
            yield prefix, value


def _number_layers(
    tensors: Mapping[str, StoredTensor], first_layer: int
) -> tuple[dict[str, StoredTensor], int]:
    """(tensors under common names with global layer numbers, number of layers)"""
    named, num_layers = {}, 0
    for original, tensor in tensors.items():
        name = common_name(original)
        if name is None:
            continue
        before, layers, after = name.partition("decoder.layers.")
        if layers:
            number, _, rest = after.partition(".")
            if not re.fullmatch("[0-9]{1,5}", number):
                raise UserError(f"the tensor {shown(original)} has no number of a layer in its name")
            num_layers = max(num_layers, int(number) + 1)
            name = f"{before}{layers}{first_layer + int(number)}.{rest}"
        named[name] = tensor
    return named, num_layers


def _size(args: Mapping[str, Any], name: str, where: Path) -> int:
    """A number of ranks among the arguments; 1 where there is none."""
    value = args.get(name, 1)
    if value is not None and (type(value) is not int or not 0 <= value < _MAX_RANKS):
        raise UserError(f"{where}: {name} = {shown(value)} in the arguments is not a number of ranks")
    return value or 1


def _open_files(directory: Path) -> dict[tuple[int, int], RankFile]:
    directories = rank_directories(directory)
    if not directories:
        raise UserError(
            f"{directory} has no mp_rank_*/{FILE_NAMES[0]}: it is not a checkpoint of Megatron, or is incomplete"
        )
    files = {
        place: RankFile(next(path / name for name in FILE_NAMES if (path / name).is_file()))
        for place, path in directories.items()
    }
    args = next(iter(files.values())).args
    num_ranks = max(_size(args, "tensor_model_parallel_size", directory), 1 + max(rank for rank, _ in files))
    num_stages = max(
        _size(args, "pipeline_model_parallel_size", directory), 1 + max(stage for _, stage in files)
    )
    absent = (
        f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if num_stages > 1 else "")
        for rank in range(num_ranks)
        for stage in range(num_stages)
        if (rank, stage) not in files
    )
    if missing := list(islice(absent, 6)):
        raise UserError(
            f"{directory} is incomplete: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} missing. With "
            f"{num_ranks} tensor-parallel ranks and {num_stages} pipeline stages there are {num_ranks * num_stages}"
        )
    return files
