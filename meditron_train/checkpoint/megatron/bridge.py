"""What Megatron-Bridge writes beside the tensors in place of Megatron-LM's arguments: run_config.yaml.

Its `model` section is the dataclass that builds the model, every field of it: those of megatron-core's
TransformerConfig and of Bridge's own GPTModelProvider; its newest versions keep the former in a mapping
`transformer` inside. Functions and enumerations stand in it as mappings with
`_target_`; nothing here imports or calls them. Sources: Megatron-Bridge `models/gpt_provider.py`,
`models/gpt/model_config.py` and `utils/yaml_utils.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meditron_train.config.yaml_file import read_yaml
from meditron_train.errors import UserError

RUN_CONFIG = "run_config.yaml"

# Without these nothing says which of the many models of a provider it is.
_NEEDED = (
    *("activation_func", "add_bias_linear", "gated_linear_unit", "normalization", "num_query_groups"),
    *("position_embedding_type", "rotary_base", "share_embeddings_and_output_weights"),
)
# Of Bridge alone, and without influence on what the model computes.
_HARMLESS = frozenset(
    """
    _builder_ _target_ bias_dropout_add_fusion builder deallocate_pipeline_outputs extra_checkpoint_metadata
    generation_config hf_model_id moe_grouped_gemm parallel_output restore_modelopt_state
    scatter_embedding_sequence_parallel should_pad_vocab use_transformer_engine_full_layer_spec
    """.split()
)
_LAYER_SPECS = frozenset(
    f"megatron.bridge.models.gpt_provider.{name}_layer_spec"
    for name in ("default", "local", "transformer_engine", "transformer_engine_full")
)
_SILU = ("silu", "torch.nn.functional.silu", "torch.nn.modules.activation.SiLU")


def read_run_config(directory: Path) -> dict[str, Any]:
    """The model that run_config.yaml in the directory of an iteration describes, as Megatron-LM's arguments.

    A field that Megatron-LM does not know keeps its name, to be refused by it (`known_args`).

    Returns:
        Argument -> value; {} without such a file.

    Raises:
        UserError: the file cannot be read, or lacks what tells the model.
    """
    path = directory / RUN_CONFIG
    if not path.is_file():
        return {}
    section = read_yaml(path).get("model")
    if not isinstance(section, dict):
        raise UserError(f"{path} has no section model, which would describe the model")
    inner = section.get("transformer")
    section = {**section, **inner} if isinstance(inner, dict) else section
    fields = {
        str(name): _plain(value) for name, value in section.items() if name not in _HARMLESS | {"transformer"}
    }
    if missing := [name for name in _NEEDED if name not in fields]:
        raise UserError(f"{path}: the section model lacks {', '.join(missing)}")
    if fields.get("transformer_layer_spec") in _LAYER_SPECS:
        del fields["transformer_layer_spec"]
    if fields["activation_func"] in _SILU:
        del fields["activation_func"]
        fields["swiglu"] = fields["gated_linear_unit"] is True
    fields["group_query_attention"] = fields["num_query_groups"] is not None
    fields["untie_embeddings_and_output_weights"] = not fields.pop("share_embeddings_and_output_weights")
    return fields


def _plain(value: Any) -> Any:
    """The name of a function, the value of an enumeration."""
    if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
        return value
    arguments = value.get("_args_")
    return arguments[0] if isinstance(arguments, list) and len(arguments) == 1 else value["_target_"]
