"""Low-rank adapters on disk: in a checkpoint of a run, and in a directory of PEFT.

A checkpoint of a run that trains adapters holds those alone; its meta.json says with which settings, and which base
they belong to. PEFT's directories hold `adapter_config.json` and `adapter_model.safetensors`; where the latter comes
from here, its header names the base too, by the hash of `base_weights.weights_sha256`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meditron_train.checkpoint.files.pickled import spelled
from meditron_train.checkpoint.files.stored import Range, Tensors
from meditron_train.checkpoint.hf.directory import HF_SUBDIRECTORY
from meditron_train.checkpoint.hf.read import open_safetensors
from meditron_train.checkpoint.sharded.read import is_sharded_directory, read_meta
from meditron_train.checkpoint.sharded.torch_dist import TorchDistTensors
from meditron_train.checkpoint.tensor_map import hf_shapes, tensor_specs
from meditron_train.config.finetuning import LoraSection
from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory, read_json_object

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
BASE_HASH_KEY = "base_weights_sha256"  # in the header of the safetensors file

_MAX_ALPHA = 1e30
_PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Of LoraConfig: what changes the result and is not A and B alone, with the values that change nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "use_qalora": (None, False),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "velora_config": (None, {}),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights before they train: A and B do not fit the base.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
}


@dataclass(frozen=True)
class AdapterWeights:
    """A and B of every adapted matrix, read when they are asked for.

    Attributes:
        directory: where they lie.
        scale: what B·A is multiplied by.
        tensors: where the factors are read.
        factors: Hugging Face name of the matrix -> names of its A and B.
        base: the directory of the base when they were trained, as far as known.
        base_sha256: the hash of its weights; None for an adapter of another program.
        hf_files: where a tokenizer may lie.
    """

    directory: Path
    scale: float
    tensors: Tensors
    factors: Mapping[str, tuple[str, str]]
    base: str | None
    base_sha256: str | None
    hf_files: Path

    def product(self, matrix: str, rows: Range | None = None) -> torch.Tensor:
        """scale·B·A of some rows of the matrix, float64."""
        a, b = self.factors[matrix]
        return (self.tensors.read(b, rows).double() @ self.tensors.read(a).double()).mul_(self.scale)

    def require_fit(self, model: ModelConfig) -> None:
        """Refuse a model that the factors do not fit.

        Raises:
            UserError: a matrix is not there, or has another shape than its factors make.
        """
        shapes = hf_shapes(model)
        for matrix, (a, b) in self.factors.items():
            shape_a, shape_b = self.tensors.shape(a), self.tensors.shape(b)
            if matrix not in shapes:
                raise UserError(f"{self.directory}: {a} belongs to {matrix}, which the model does not have")
            if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
                raise UserError(
                    f"{self.directory}: {a} {list(shape_a)} and {b} {list(shape_b)} are no factors"
                )
            if (shape_b[0], shape_a[1]) != shapes[matrix]:
                raise UserError(
                    f"{self.directory}: {a} and {b} make a matrix of {[shape_b[0], shape_a[1]]}, but {matrix} is "
                    f"{list(shapes[matrix])}: this adapter is for another base"
                )


def adapter_names(model: ModelConfig, lora: LoraSection) -> dict[str, tuple[str, str]]:
    """Hugging Face name of each adapted matrix -> names of its A and B in a checkpoint of a run."""
    names = {}
    for spec in tensor_specs(model):
        for hf_name in spec.hf_names:
            projection = hf_name.split(".")[-2]
            if spec.layer is not None and len(spec.shape) == 2 and projection in lora.targets:
                place = f"{spec.name.removesuffix('weight')}{projection}"
                names[hf_name] = (f"{place}_lora_A", f"{place}_lora_B")
    return names


def peft_names(matrix: str) -> tuple[str, str]:
    """PEFT's names of A and B of a matrix."""
    place = f"base_model.model.{matrix.removesuffix('.weight')}"
    return f"{place}.lora_A.weight", f"{place}.lora_B.weight"


def adapter_facts(lora: LoraSection, base: Path | None, base_sha256: str | None) -> dict[str, Any]:
    """What meta.json says of adapters: settings, and which base they belong to."""
    return {
        "lora": {**lora.model_dump(mode="json"), "alpha": lora.scale * lora.rank},
        "base": {"directory": None if base is None else str(base.resolve()), "weights_sha256": base_sha256},
    }


def is_adapter_checkpoint(directory: Path) -> bool:
    """Whether `directory` is a checkpoint of adapters alone."""
    return (
        is_sharded_directory(directory)
        and (directory / "meta.json").is_file()
        and "lora" in read_meta(directory)
    )


def is_adapter_directory(directory: Path) -> bool:
    """Whether `directory` holds adapters alone, in either format."""
    is_peft = (directory / CONFIG_NAME).is_file() and not (directory / "config.json").is_file()
    return is_peft or is_adapter_checkpoint(directory)


def open_adapter(directory: Path) -> AdapterWeights:
    """Open a directory of PEFT or a checkpoint of adapters.

    Raises:
        UserError: it is neither, is damaged, or does more than add B·A to matrices of the layers.
    """
    if not directory.is_dir():
        raise UserError(describe_missing_directory(directory))
    if is_adapter_checkpoint(directory):
        return _open_checkpoint(directory)
    if (directory / CONFIG_NAME).is_file():
        return _open_peft(directory)
    raise UserError(f"{directory} is not an adapter: it has no {CONFIG_NAME}")


def _open_checkpoint(directory: Path) -> AdapterWeights:
    meta = read_meta(directory)
    try:
        lora, model = LoraSection.model_validate(meta["lora"]), ModelConfig.model_validate(meta["model"])
        base, base_sha256 = meta["base"]["directory"], meta["base"]["weights_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / 'meta.json'} does not describe an adapter: {error}") from None
    tensors, factors = TorchDistTensors(directory, read_once=False), adapter_names(model, lora)
    found = set(tensors.names)
    if missing := [name for names in factors.values() for name in names if name not in found]:
        raise UserError(f"{directory} does not hold {missing[0]}")
    _require_rank(directory / "meta.json", lora.rank, tensors, factors)
    return AdapterWeights(
        directory, lora.scale, tensors, factors, base, base_sha256, directory / HF_SUBDIRECTORY
    )


def _require_rank(said_in: Path, rank: int, tensors: Tensors, factors: Mapping[str, tuple[str, str]]) -> None:
    """The rank decides the scale, so that another one would merge other weights."""
    for a, b in factors.values():
        shape_a, shape_b = tensors.shape(a), tensors.shape(b)
        if len(shape_a) != 2 or len(shape_b) != 2 or not rank == shape_a[0] == shape_b[1]:
            raise UserError(
                f"{said_in} says rank {rank}, but {a} is {list(shape_a)} and {b} is {list(shape_b)}"
            )


def _open_peft(directory: Path) -> AdapterWeights:
    config = read_json_object(directory / CONFIG_NAME)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{directory} holds an adapter of PEFT of the type {spelled(config.get('peft_type'))}; LORA alone is read "
            "here. Merge it into its base model with merge_and_unload of peft"
        )
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(
                f"{directory / CONFIG_NAME}: {key} is {spelled(config[key])}, which is more than B·A. Merge it with "
                "merge_and_unload of peft"
            )
    rank, alpha = config.get("r", 0), config.get("lora_alpha", float("nan"))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not abs(alpha) < _MAX_ALPHA:
        raise UserError(
            f"{directory / CONFIG_NAME} says r {spelled(rank)} and lora_alpha {spelled(alpha)}: a whole number from 1 "
            "on and a finite number are wanted"
        )
    if config.get("rank_pattern"):
        raise UserError(
            f"{directory / CONFIG_NAME}: ranks differ (rank_pattern). Merge it with merge_and_unload of peft"
        )
    if not (directory / WEIGHTS_NAME).is_file():
        raise UserError(f"{directory} has no {WEIGHTS_NAME}")
    tensors, said = open_safetensors(directory / WEIGHTS_NAME)
    halves: dict[str, dict[str, str]] = {}
    for name in tensors.names:
        match = _PEFT_NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{directory}: {name} is not A or B of a matrix")
        halves.setdefault(f"{match[1]}.weight", {})[match[2]] = name
    if alone := [matrix for matrix, found in halves.items() if len(found) < 2]:
        raise UserError(f"{directory}: {alone[0]} has only one of A and B")
    factors = {matrix: (found["A"], found["B"]) for matrix, found in halves.items()}
    _require_rank(directory / CONFIG_NAME, rank, tensors, factors)
    return AdapterWeights(
        directory,
        alpha / rank**0.5 if config.get("use_rslora") else alpha / rank,
        tensors,
        factors,
        config.get("base_model_name_or_path"),
        said.get(BASE_HASH_KEY),
        directory,
    )


def peft_config(lora: LoraSection, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json, for any release of PEFT."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
