"""Between a Hugging Face `config.json` and `ModelConfig`.

Reading takes what transformers 4.x wrote (`rope_theta`, `rope_scaling` with `type` or `rope_type`, `torch_dtype`) and
what 5.x writes (`rope_parameters`, `dtype`). Writing gives both spellings: transformers 4.57 silently ignores
`rope_parameters` and would compute other logits from a file written by 5.x alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from meditron_train.checkpoint.hf.families import HFFamily, family_keys, find_family, read_window
from meditron_train.checkpoint.hf.keys import key_problems
from meditron_train.checkpoint.hf.rope import read_rope, rope_keys
from meditron_train.config.model_config import MAX_LAYERS, ModelConfig
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory, read_json_object

DTYPES = ("float32", "bfloat16", "float16")

# The version whose keys are written; readers use it only to choose migrations, and the file carries both spellings.
TRANSFORMERS_VERSION = "4.57.1"

_SILU = ("silu", "swish")  # two names of one function in transformers
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SIZES = (
    *_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
    "sliding_window",
)  # fmt: skip
_NUMBERS = ("rms_norm_eps", "initializer_range", "rope_theta")
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
_OBJECTS = ("rope_parameters", "rope_scaling")


def read_hf_config(directory: str | Path) -> ModelConfig:
    """Read `directory/config.json`.

    Raises:
        UserError: it is missing, not JSON, or not of a supported family.
    """
    return model_config_from_hf(load_config_json(directory), where=str(Path(directory) / "config.json"))


def stated_token_ids(directory: str | Path) -> dict[str, int | tuple[int, ...] | None]:
    """What `directory/config.json` says of bos_token_id, eos_token_id and pad_token_id; empty where there is none.

    Args:
        directory: a tokenizer's; its config.json may be of any architecture.

    Raises:
        UserError: it cannot be read, or an id is none.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        return {}
    config = read_json_object(path)
    found: dict[str, int | tuple[int, ...] | None] = {}
    for key in (key for key in _TOKEN_IDS if key in config):
        value = config[key]
        several = isinstance(value, list) and key == "eos_token_id"
        if value is not None and not all(map(_is_integer, value if several else [value])):
            raise UserError(f"{path}: {key} = {value!r}: must be an integer")
        found[key] = tuple(value) if several else value
    return found


def random_model_config(hf_config: Mapping[str, Any], tokenizer_vocab_size: int | None) -> ModelConfig:
    """The model that `model.hf_config` describes: a Llama with the tokenizer's vocabulary, where it does not say."""
    values: dict[str, Any] = dict(hf_config)
    if not values.get("model_type") and not values.get("architectures"):
        values["model_type"] = "llama"
    if values.get("vocab_size") is None:
        values["vocab_size"] = tokenizer_vocab_size
    return model_config_from_hf(values, where="model.hf_config")


def load_config_json(directory: str | Path) -> dict[str, Any]:
    """The raw `config.json` of a Hugging Face directory as a dict.

    Raises:
        UserError: it is missing or unreadable.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        raise UserError(describe_missing_directory(directory))
    if not path.is_file():
        refuse_adapter(directory)
        hint = ""
        if (directory / "params.json").is_file():
            hint = " It holds Meta's original release: use the repository whose name ends in -hf."
        raise UserError(f"{path} does not exist, so {directory} is not a Hugging Face model directory.{hint}")
    return read_json_object(path)


def refuse_adapter(directory: Path) -> None:
    """Refuse the directory of a PEFT adapter, alone or beside weights that transformers would add it to.

    Raises:
        UserError: there is an adapter_config.json.
    """
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds an adapter of PEFT (adapter_config.json), which changes another model: merge it into "
            "its base model (`convert merge-adapter`, or merge_and_unload of peft) and give the merged one; where the "
            "weights beside it are whole without it, move adapter_config.json away"
        )


def model_config_from_hf(config: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """`ModelConfig` of a Hugging Face config dict (transformers 4.x or 5.x).

    Every key is used, known to be harmless, or refused (`keys`).

    Raises:
        UserError: an unknown architecture, a missing or unknown key, or a feature that the model does not
            have (biases on other layers than its family's, other activations, other RoPE). The message names
            `where` and the key.
    """
    family = find_family(config, where)
    problems = _type_problems(config)
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        problems.append(f"missing {', '.join(missing)}; a {family.architecture} must state them")
    problems += key_problems(config)
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    value = {**family.defaults, **config}
    if value["hidden_act"] not in _SILU:
        raise UserError(f"{where}: hidden_act is {value['hidden_act']!r}; nothing but 'silu' is supported")
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    num_kv_heads = value.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise UserError(
            f"{where}: num_attention_heads = {num_heads} is not a multiple of num_key_value_heads = {num_kv_heads}"
        )
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise UserError(
            f"{where}: hidden_size = {hidden_size} is not a multiple of num_attention_heads = {num_heads}, "
            f"and head_dim is not given"
        )
    head_dim = config.get("head_dim") or hidden_size // num_heads
    if head_dim % 2:
        raise UserError(
            f"{where}: head_dim is {head_dim}: it must be even, as RoPE rotates pairs of its elements"
        )
    eos = value["eos_token_id"]
    try:
        return _build(
            family, value, num_kv_heads, head_dim, tuple(eos) if isinstance(eos, list) else eos, where
        )
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors()
        )
        raise UserError(f"{where}: {details}") from None


def _build(
    family: HFFamily, value: dict[str, Any], num_kv_heads: int, head_dim: int, eos: Any, where: str
) -> ModelConfig:
    num_layers = value["num_hidden_layers"]
    sliding_window, num_full_attention_layers = read_window(family, value, num_layers, where)
    return ModelConfig(
        family=family.name,
        vocab_size=value["vocab_size"],
        hidden_size=value["hidden_size"],
        intermediate_size=value["intermediate_size"],
        num_layers=num_layers,
        num_heads=value["num_attention_heads"],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=value["max_position_embeddings"],
        rms_norm_eps=value["rms_norm_eps"],
        rope=read_rope(value, where),
        tie_embeddings=bool(value["tie_word_embeddings"]),
        sliding_window=sliding_window,
        num_full_attention_layers=num_full_attention_layers,
        initializer_range=value["initializer_range"],
        bos_token_id=value["bos_token_id"],
        eos_token_id=eos,
        pad_token_id=value["pad_token_id"],
        dtype=_read_dtype(value, where),
    )


def model_config_to_hf(model: ModelConfig, dtype: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model: the keys transformers 5.x writes, and 4.x's spelling beside them.

    `dtype` is the dtype of the tensors that will lie beside the file ("float32", "bfloat16", "float16"); default: the
    model's own. `model_config_from_hf(model_config_to_hf(m)) == m`.
    """
    eos = model.eos_token_id
    dtype = dtype or model.dtype
    keys = {
        **family_keys(model),
        "attention_dropout": 0.0,
        "bos_token_id": model.bos_token_id,
        "dtype": dtype,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.initializer_range,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "pad_token_id": model.pad_token_id,
        "rms_norm_eps": model.rms_norm_eps,
        **rope_keys(model.rope),
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS_VERSION,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
    return dict(sorted(keys.items()))  # as transformers writes them


def generation_config_of(model: ModelConfig) -> dict[str, Any]:
    """A minimal `generation_config.json`: which tokens begin and end a text."""
    eos = model.eos_token_id
    config = {
        "_from_model_config": True,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": model.pad_token_id,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    return {key: value for key, value in config.items() if value is not None}


def _type_problems(config: dict[str, Any]) -> list[str]:
    """Values of another JSON type than transformers gives them; null counts as left out.

    Python would let some through with another meaning: "false" is true, and true is 1.
    """
    token_ids = config.get("eos_token_id")
    values = [(key, config.get(key)) for key in ("bos_token_id", "pad_token_id")]
    values += [
        ("eos_token_id", i) for i in (token_ids if isinstance(token_ids, list | tuple) else [token_ids])
    ]
    layers = config.get("max_window_layers")
    expected = [
        ("an integer from 0", [("max_window_layers", layers)], lambda v: _is_integer(v) and v >= 0),
        (
            "a positive integer",
            [(key, config.get(key)) for key in _SIZES],
            lambda v: _is_integer(v) and 0 < v < 1 << 31,
        ),
        (
            f"at most {MAX_LAYERS}",
            [(key, config.get(key)) for key in ("num_hidden_layers", "max_window_layers")],
            lambda v: not _is_integer(v) or v <= MAX_LAYERS,
        ),
        ("an integer", values, _is_integer),
        ("a number", [(key, config.get(key)) for key in _NUMBERS], _is_number),
        ("true or false", [(key, config.get(key)) for key in _FLAGS], lambda v: isinstance(v, bool)),
        ("an object", [(key, config.get(key)) for key in _OBJECTS], lambda v: isinstance(v, dict)),
    ]
    return [
        f"{key} = {value!r}: must be {kind}"
        for kind, entries, is_right in expected
        for key, value in entries
        if value is not None and not is_right(value)
    ]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_dtype(config: dict[str, Any], where: str) -> Any:
    """As stated; float32 where nothing is, or "auto", which leaves it to the tensors."""
    named = {
        key: str(config[key]).removeprefix("torch.")
        for key in ("dtype", "torch_dtype")
        if config.get(key) not in (None, "", "auto")
    }
    if len(set(named.values())) > 1:
        raise UserError(
            f"{where}: dtype is {named['dtype']} but torch_dtype is {named['torch_dtype']}. Make them equal"
        )
    dtype = next(iter(named.values()), "float32")
    if dtype not in DTYPES:
        raise UserError(f"{where}: dtype {dtype!r} is not supported. Supported: {', '.join(DTYPES)}")
    return dtype
