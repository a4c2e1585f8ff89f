"""How likely a model finds texts that begin alike, and what it says next: forward passes over all stages of the model.

A question's answers are packed behind their common beginning, which is computed once:

    tokens      prefix | answer 1 | answer 2 | ...
    queries     prefix | answer 1 | answer 2 | ...
    their keys  prefix | prefix, answer 1 | prefix, answer 2 | ...

so that each answer sees the prefix and itself. An answer's last token is only predicted, never read, and the output
layer computes those tokens alone whose next token is asked for.

Legend: T packed tokens, S keys (prefixes repeated), R predicted tokens, V vocabulary rows of this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from meditron_train.config.model_config import ModelConfig
from meditron_train.errors import UserError
from meditron_train.layout import ParallelLayout, RankCoordinates
from meditron_train.mcore import ProcessGroupCollection, get_forward_backward_func
from meditron_train.model.attention import PackedSequence
from meditron_train.model.cross_entropy import gather_vocabulary, vocabulary_statistics
from meditron_train.model.llama import LlamaModel
from meditron_train.model.rope import cos_sin
from meditron_train.native import AttentionSpan, Rotation
from meditron_train.native.packing import pack_best_fit

Tokens = tuple[int, ...]
Collected = Callable[[torch.Tensor, "Packed"], Any]  # of logits [R, V] and their batch


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
class Packed:
    """A packed micro-batch.

    Attributes:
        numbers: of the questions in it, among all.
        tokens_T: int64.
        rows_R, labels_R: int64: the tokens whose next ones are predicted, and those.
        sequence: what the layers need to know.
    """

    numbers: tuple[int, ...]
    tokens_T: torch.Tensor
    rows_R: torch.Tensor
    labels_R: torch.Tensor
    sequence: PackedSequence


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

        outputs = self._run(questions, max_tokens, collect)
        return {number: scores for output in outputs for number, scores in output.items()}

    def next_logits(self, contexts: Sequence[Tokens], max_tokens: int) -> dict[int, torch.Tensor]:
        """fp32 logits [vocabulary] of the token after each context, by its number, as `log_likelihoods`; collective."""

        def collect(logits_RV: torch.Tensor, batch: Packed) -> dict[int, torch.Tensor]:
            whole_RV = gather_vocabulary(logits_RV, self.groups.tp)[:, : self.model.vocab_size].float()
            return dict(zip(batch.numbers, whole_RV.cpu(), strict=True))

        asked = [Answers(context, ((0,),)) for context in contexts]
        outputs = self._run(asked, max_tokens, collect)
        return {number: logits for output in outputs for number, logits in output.items()}

    def _num_real(self, logits_RV: torch.Tensor) -> int:
        """Columns that are not padding."""
        width = logits_RV.shape[-1]
        return min(max(self.model.vocab_size - self.at.tensor * width, 0), width)

    def _run(self, questions: Sequence[Answers], max_tokens: int, collect: Collected) -> list[Any]:
        """What `collect` gives for this rank's micro-batches, on the first rank of the last stage; else nothing."""
        bins = _bins(questions, max_tokens)
        # Nothing is gathered along the sequence, so that context-parallel ranks are data-parallel ones here.
        copies, mine = (
            self.layout.data * self.layout.context,
            self.at.data * self.layout.context + self.at.context,
        )
        own = bins[mine::copies]
        if not own:
            return []
        if self.layout.virtual_pipeline > 1:  # the interleaved schedule takes multiples of the stages
            own += [own[0]] * (-len(own) % self.layout.pipeline)
        length = 0
        if self.layout.pipeline > 1 or self.layout.sequence:
            length = max(sum(questions[number].num_tokens for number in numbers) for numbers in own)
            length += -length % self.layout.tensor

        def batches() -> Iterator[Packed]:
            return (pack(self.model, questions, numbers, length, self.device) for numbers in own)

        several = len(self.chunks) > 1
        for chunk in self.chunks:
            chunk.eval()
        with torch.no_grad():
            outputs = get_forward_backward_func()(
                forward_step_func=partial(_forward_step, collect, self.layout.sequence),
                data_iterator=[batches() for _ in self.chunks] if several else batches(),
                model=list(self.chunks) if several else self.chunks[0],
                num_microbatches=len(own),
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
    tokens: list[int] = []
    positions: list[int] = []  # of the queries
    keys: list[int] = []  # the place of each key among the tokens
    key_positions: list[int] = []
    query_lengths: list[int] = []
    key_lengths: list[int] = []
    rows: list[int] = []
    labels: list[int] = []

    def add(new: Sequence[int], seen: range) -> range:
        """A document of `new` tokens that also sees the tokens at `seen`; returns the places of the new ones."""
        places = range(len(tokens), len(tokens) + len(new))
        tokens.extend(new)
        positions.extend(range(len(seen), len(seen) + len(new)))
        keys.extend([*seen, *places])
        key_positions.extend(range(len(seen) + len(new)))
        query_lengths.append(len(new))
        key_lengths.append(len(seen) + len(new))
        return places

    for number in numbers:
        question = questions[number]
        prefix = add(question.prefix, range(0))
        for answer in question.answers:
            places = add(answer[:-1], prefix) if len(answer) > 1 else range(0)
            rows += [prefix[-1], *places]
            labels += answer
    if len(tokens) < length:
        add([0] * (length - len(tokens)), range(0))

    def boundaries(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    cos_PC, sin_PC = cos_sin(model, torch.arange(max(key_lengths), device=device))
    on_device = partial(torch.tensor, dtype=torch.int64, device=device)
    span = AttentionSpan(0, len(tokens), 0, len(keys), boundaries(query_lengths), boundaries(key_lengths))
    sequence = PackedSequence(
        qkv_format="thd",
        spans=(span,),
        rotations=(Rotation(cos_PC, sin_PC, on_device(positions), on_device(key_positions)),),
        key_index=on_device(keys),
    )
    return Packed(numbers, on_device(tokens), on_device(rows), on_device(labels), sequence)


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
