"""How ranks share one model: the sizes of the parallel dimensions, and which rank does what.

Pure arithmetic: no torch, no process group. Everything that must know "who holds what" before (or without)
any communication asks here: the config check, the planner, checkpoint conversion, the data loader.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

# The parallel plan: which dimension of a tensor is split over the tensor-parallel ranks, under megatron-core's names;
# None: every rank holds the whole. Matrices are [outputs, inputs]: the first of two is split by outputs, the second by
# inputs, so that between them nothing is communicated (Shoeybi et al. 2019, section 3).
SPLIT_DIMS: dict[str, int | None] = {
    "embedding.word_embeddings.weight": 0,  # rows of the vocabulary
    "input_layernorm.weight": None,
    "self_attention.linear_qkv.weight": 0,  # KV heads, each with its query heads
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_proj.weight": 1,
    "pre_mlp_layernorm.weight": None,
    "mlp.linear_fc1.weight": 0,  # feed-forward channels, of gate and of up
    "mlp.linear_fc2.weight": 1,
    "final_layernorm.weight": None,
    "output_layer.weight": 0,  # rows of the vocabulary
    # Adapters (`model/lora.py`): whatever lies between A and B is small and whole on every rank.
    **{f"{name}_proj_lora_B": 0 for name in ("q", "k", "v", "gate", "up")},
    **{f"{name}_proj_lora_A": 1 for name in ("o", "down")},
}


def split_dim(name: str) -> int | None:
    """The entry of SPLIT_DIMS for a tensor, whatever stands before (`decoder.layers.3.`); None for one without."""
    return next((d for suffix, d in SPLIT_DIMS.items() if f".{name}".endswith(f".{suffix}")), None)


@dataclass(frozen=True)
class RankCoordinates:
    """The place of one rank in each parallel dimension, counted from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions. Data parallelism is what is left of `world_size`.

    `virtual_pipeline` is the number of model chunks per pipeline rank (1: plain 1F1B);
    `sequence` is sequence parallelism inside the tensor-parallel group.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    sequence: bool = False

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together hold one copy of the model and work on the same sample."""
        return self.tensor * self.pipeline * self.context

    @property
    def data(self) -> int:
        """Data-parallel size; meaningful once `problems()` is empty."""
        return self.world_size // self.model_parallel_size

    def problems(self) -> list[str]:
        """Everything that makes this layout impossible, one sentence each; empty when it is sound."""
        sizes = {
            "world size": self.world_size,
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.virtual_pipeline": self.virtual_pipeline,
            "parallel.context": self.context,
        }
        found = [f"{name} is {size}: it must be at least 1" for name, size in sizes.items() if size < 1]
        if found:
            return found
        if self.world_size % self.model_parallel_size:
            found.append(
                f"world size {self.world_size} is not divisible by parallel.tensor x parallel.pipeline x "
                f"parallel.context = {self.tensor} x {self.pipeline} x {self.context} = "
                f"{self.model_parallel_size}; start a multiple of {self.model_parallel_size} processes, or "
                "make these sizes smaller"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            found.append(
                f"parallel.virtual_pipeline is {self.virtual_pipeline} but parallel.pipeline is 1: the "
                "interleaved schedule needs at least 2 stages; set parallel.virtual_pipeline to 1"
            )
        return found

    def coordinates(self, rank: int) -> RankCoordinates:
        """Place of a global rank, in megatron-core's default order "tp-cp-ep-dp-pp" (tp varies fastest).

        Raises:
            ValueError: the rank is outside the world.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the world of {self.world_size} ranks")
        rank, tensor = divmod(rank, self.tensor)
        rank, context = divmod(rank, self.context)
        pipeline, data = divmod(rank, self.data)
        return RankCoordinates(tensor=tensor, context=context, data=data, pipeline=pipeline)

    def layers_of(self, pipeline_rank: int, virtual_rank: int, num_layers: int) -> range:
        """Global 0-based layer numbers of one model chunk.

        Chunks are dealt to the stages in turn, as Megatron's interleaved schedule wants them: with 2 stages
        and 2 chunks each, 8 layers go [0,1] [2,3] to the first chunks of stages 0 and 1, then [4,5] [6,7] to
        the second. Layers that do not divide (with one chunk for each stage only) go to the stages in the
        middle first, then to the first one: the last one has the output layer.

        Raises:
            ValueError: there is no such chunk.
        """
        if not (0 <= pipeline_rank < self.pipeline and 0 <= virtual_rank < self.virtual_pipeline):
            raise ValueError(f"there is no chunk {virtual_rank} on stage {pipeline_rank} in {self}")
        counts = self.layer_counts(num_layers)
        chunk = virtual_rank * self.pipeline + pipeline_rank
        first = sum(counts[:chunk])
        return range(first, first + counts[chunk])

    def layers_on(self, pipeline_rank: int, num_layers: int) -> list[int]:
        """Global 0-based numbers of all layers of one stage, chunk after chunk.

        Raises:
            ValueError: `layer_problem` has one.
        """
        firsts = [0, *accumulate(self.layer_counts(num_layers))]
        chunks = range(pipeline_rank, self.pipeline * self.virtual_pipeline, self.pipeline)
        return [layer for chunk in chunks for layer in range(firsts[chunk], firsts[chunk + 1])]

    def layer_counts(self, num_layers: int) -> list[int]:
        """Layers of each model chunk, in the order in which a sample passes them.

        Raises:
            ValueError: `layer_problem` has one.
        """
        if problem := self.layer_problem(num_layers):
            raise ValueError(problem)
        num_chunks = self.pipeline * self.virtual_pipeline
        each, rest = divmod(num_layers, num_chunks)
        counts = [each] * num_chunks
        for chunk in [*range(1, num_chunks - 1), 0][:rest]:
            counts[chunk] += 1
        return counts

    def layer_problem(self, num_layers: int) -> str | None:
        """Why the layers cannot be dealt to the stages, in words; None where they can."""
        num_chunks = self.pipeline * self.virtual_pipeline
        if self.virtual_pipeline > 1 and num_layers % num_chunks:
            return (
                f"{num_layers} layers are not divisible by parallel.pipeline x parallel.virtual_pipeline = "
                f"{self.pipeline} x {self.virtual_pipeline} = {num_chunks}"
            )
        if num_layers < num_chunks:
            return f"{num_layers} layers are fewer than parallel.pipeline = {self.pipeline} stages"
        return None
