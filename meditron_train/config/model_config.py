"""The shape of a model of the Llama kind, independent of any file format."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(ge=1, lt=1 << 31)]
MAX_LAYERS = 10_000  # with a thousand times that, their names alone would fill the memory
LayerCount = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
Family = Literal["llama", "mistral", "qwen2"]


class RopeConfig(BaseModel):
    """Rotary position embedding: base frequency and the scaling that extends it to longer texts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(default=10000.0, gt=0)
    kind: Literal["default", "linear", "dynamic", "llama3"] = "default"
    factor: float = Field(default=1.0, gt=0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int | None = None


class ModelConfig(BaseModel):
    """Sizes and constants of one model, as its checkpoint states them (vocabulary unpadded).

    Attributes:
        family: llama (also Code Llama, TinyLlama, Llama 3.x), mistral, qwen2 (also Qwen2.5: query, key and
            value have a bias).
        sliding_window: how many keys a query sees at most, its own included; None: all of its document.
        num_full_attention_layers: number of first layers without a window (Qwen2's max_window_layers).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family = "llama"
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_layers: LayerCount
    num_heads: Size
    num_kv_heads: Size
    head_dim: Size
    max_position_embeddings: Size
    rms_norm_eps: float = Field(gt=0)
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    sliding_window: Size | None = None
    num_full_attention_layers: Annotated[int, Field(ge=0)] = 0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}: "
                "each key/value head serves the same number of query heads"
            )
        return self

    def padded_vocab_size(self, tp: int, multiple: int = 128) -> int:
        """Embedding rows in memory: the smallest multiple of `multiple` and `tp` with room for all tokens."""
        step = math.lcm(multiple, tp)
        return -(-self.vocab_size // step) * step

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the query, key and value projections add a bias."""
        return self.family == "qwen2"

    def has_window(self, layer: int) -> bool:
        """Whether attention in this layer (from 0) is limited to the sliding window."""
        return self.sliding_window is not None and layer >= self.num_full_attention_layers

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the input embedding alone (unpadded)."""
        return self.vocab_size * self.hidden_size

    @property
    def num_layer_vector_parameters(self) -> int:
        """Parameters of one transformer layer outside its matrices: two norms, and biases where there are any."""
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.has_qkv_bias else 0
        return 2 * self.hidden_size + biases

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one transformer layer: attention, SwiGLU, norms and biases."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        mlp = 3 * self.intermediate_size * self.hidden_size
        return attention + mlp + self.num_layer_vector_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters, unpadded; tied embeddings are counted once."""
        embeddings = self.num_embedding_parameters * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * self.num_layer_parameters + self.hidden_size
