"""How likely a model finds texts that begin alike: forward passes over all stages of the model.

A question's answers are packed behind their common beginning, which is computed once:

    tokens      prefix | answer 1 | answer 2 | ...
    queries     prefix | answer 1 | answer 2 | ...
    their keys  prefix | prefix, answer 1 | prefix, answer 2 | ...

so that each answer sees the prefix and itself. An answer's last token is only predicted, never read, and the output
layer computes those tokens alone whose next token is asked for.

Legend: T packed tokens, S keys (prefixes repeated), R predicted tokens, V vocabulary rows of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.layout import ParallelLayout, RankCoordinates
from meditron_train.mcore import ProcessGroupCollection, get_forward_backward_func
from meditron_train.model.cross_entropy import vocabulary_statistics
from meditron_train.model.llama import LlamaModel
from meditron_train.model.micro_batch import MicroBatch, Packed, Tokens
from meditron_train.native.packing import pack_best_fit

Collected = Callable[[torch.Tensor, Packed], Any]  # of logits [R, V] and their batch


@dataclass(frozen=True)
class Answers:
    """Continuations of one prefix; neither is empty."""

    prefix: Tokens
    answers: tuple[Tokens, ...]

    @property
    def num_tokens(self) -> int:
        """What a forward pass reads."""
        return len(self.prefix) + sum(len(answer) - 1 for answer in self.answers)


def fitted(context: Sequence[int], answer: Sequence[int], max_length: int) -> tuple[Tokens, Tokens]:
    """Both within what the model reads, counted without the last token, which is only predicted: a context that is too
    long loses its beginning.

    Raises:
        UserError: the answer alone is too long, or nothing is before it or in it.
    """
    if not answer or not context:
        raise UserError("an answer or its prompt has no tokens of its own: the tokenizer joins them into one")
    room = max_length + 1 - len(answer)
    if room < 1:
        raise UserError(f"an answer has {len(answer)} tokens; the model reads at most {max_length}")
    return tuple(context[-room:]), tuple(answer)


@dataclass(frozen=True)
class LogLikelihood:
    """Of a continuation: sum of ln p over its tokens in nats, and whether each of them is the likeliest."""

    nats: float
    is_greedy: bool


@dataclass(frozen=True)
class ModelOnRanks:
    """This rank's part of a model, and its place.

    Attributes:
        chunks: of this pipeline stage, with whole parameters.
    """

    model: ModelConfig
    chunks: Sequence[LlamaModel]
    layout: ParallelLayout
    at: RankCoordinates
    groups: ProcessGroupCollection
    device: torch.device

    def log_likelihoods(
        self, questions: Sequence[Answers], max_tokens: int
    ) -> dict[int, tuple[LogLikelihood, ...]]:
        """Of every answer, by the question's number; a part of them on some ranks, together all. Collective.

        Args:
            questions: the same on every rank; none is longer than the model reads.
            max_tokens: of a micro-batch; a longer question is one of its own.
        """

        def collect(logits_RV: torch.Tensor, batch: Packed) -> dict[int, tuple[LogLikelihood, ...]]:
            max_R, sum_R, label_R = vocabulary_statistics(
                logits_RV, batch.labels_R, self._num_real(logits_RV), self.groups.tp
            )
            log_p = (label_R - max_R - sum_R.log()).double().tolist()
            is_largest = (label_R >= max_R).tolist()
            place, found = 0, {}
            for number in batch.numbers:
                scores = []
                for answer in questions[number].answers:
                    rows = slice(place, place := place + len(answer))
                    scores.append(LogLikelihood(sum(log_p[rows]), all(is_largest[rows])))
                found[number] = tuple(scores)
            return found

        own = _bins(questions, max_tokens)[self.copy :: self.num_copies]
        if not own:
            return {}
        if self.layout.virtual_pipeline > 1:  # the interleaved schedule takes multiples of the stages
            own += [own[0]] * (-len(own) % self.layout.pipeline)
        length = self.padded_length(
            sum(questions[number].num_tokens for number in numbers) for numbers in own
        )

        def batches() -> Iterator[Packed]:
            return (pack(self.model, questions, numbers, length, self.device) for numbers in own)

        outputs = self.run(len(own), batches, length, collect)
        return {number: scores for output in outputs for number, scores in output.items()}

    def _num_real(self, logits_RV: torch.Tensor) -> int:
        """Columns that are not padding."""
        width = logits_RV.shape[-1]
        return min(max(self.model.vocab_size - self.at.tensor * width, 0), width)

    @property
    def copy(self) -> int:
        """Which copy of the model this rank belongs to: nothing is gathered along the sequence, so that
        context-parallel ranks are data-parallel ones here."""
        return self.at.data * self.layout.context + self.at.context

    @property
    def num_copies(self) -> int:
        return self.layout.data * self.layout.context

    def padded_length(self, num_tokens: Iterable[int]) -> int:
        """What micro-batches of so many tokens are padded to; 0 where each may keep its own length."""
        if self.layout.pipeline == 1 and not self.layout.sequence:
            return 0
        longest = max(num_tokens)
        return longest + -longest % self.layout.tensor

    def run(
        self, num_microbatches: int, batches: Callable[[], Iterator[Packed]], length: int, collect: Collected
    ) -> list[Any]:
        """What `collect` gives for each of the copy's micro-batches, on the first rank of its last stage; else nothing.

        Args:
            batches: gives them; it is asked once for each chunk of the model.
            length: of each, where not 0.
        """
        several = len(self.chunks) > 1
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            outputs = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, collect, self.layout.sequence),
                data_iterator=[batches() for _ in self.chunks] if several else batches(),
                model=list(self.chunks) if several else self.chunks[0],
                num_microbatches=num_microbatches,
                seq_length=length * self.layout.context,  # which the schedules divide by it
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return outputs if self.at.tensor == 0 else []


def _bins(questions: Sequence[Answers], max_tokens: int) -> list[tuple[int, ...]]:
    """Numbers of the questions of each micro-batch, none of which is empty."""
    if not questions:
        return []
    lengths = [question.num_tokens for question in questions]
    order, offsets = pack_best_fit(lengths, max(max_tokens, *lengths), num_threads=1)
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return [tuple(order[first:end].tolist()) for first, end in bounds if end > first]


def pack(
    model: ModelConfig,
    questions: Sequence[Answers],
    numbers: tuple[int, ...],
    length: int,
    device: torch.device,
) -> Packed:
    """The micro-batch of these questions, padded to `length` tokens where it is shorter."""
    batch = MicroBatch()
    for number in numbers:
        question = questions[number]
        prefix = batch.add(question.prefix, range(0))
        for answer in question.answers:
            places = batch.add(answer[:-1], prefix) if len(answer) > 1 else range(0)
            batch.ask([prefix[-1], *places], answer)
    return batch.packed(model, numbers, length, device)


def _forward_step(
    collect: Collected, is_split: bool, batches: Iterator[Packed], chunk: LlamaModel
) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    with _output_of(chunk, None if is_split else batch.rows_R):
        output = chunk(batch.tokens_T[None], None, None, packed_seq_params=batch.sequence)

    def collected(logits_BRV: torch.Tensor, non_loss_data: bool) -> Any:
        logits_RV = logits_BRV[0, batch.rows_R] if is_split else logits_BRV[0]
        return collect(logits_RV, batch)

    return output, collected


@contextmanager
def _output_of(chunk: LlamaModel, rows_R: torch.Tensor | None) -> Iterator[None]:
    """The output layer computes these tokens alone. Not where sequence parallelism splits them before it (None)."""
    if rows_R is None or not chunk.post_process:
        yield
        return

    def choose(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][rows_R], *args[1:])

    handle = chunk.output_layer.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def merged(parts: Sequence[Mapping[int, Any]]) -> dict[int, Any]:
    """The parts of all ranks as one."""
    return {number: value for part in parts for number, value in part.items()}
