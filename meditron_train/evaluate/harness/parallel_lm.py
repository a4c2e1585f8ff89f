"""A model on many ranks, as the lm-evaluation-harness sees it.

Every rank runs the harness with all requests and gets the same answers; the ranks meet in the forward passes. Their
harness therefore believes to be alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from meditron_train.errors import UserError
from meditron_train.evaluate.parallel_model import ParallelModel
from meditron_train.model import Answers, Decoding, LogLikelihood, merged
from meditron_train.model.answers import fitted
from meditron_train.model.micro_batch import Tokens

_NEUTRAL = {"top_p": 1.0, "top_k": 0, "num_beams": 1}  # what may be asked for, as it changes nothing


class ParallelLM(TemplateLM):
    """Log-likelihoods and generation.

    Args:
        parallel: the model.
        tokenizer: transformers' tokenizer.
        add_bos: a BOS token precedes every prompt.
        ends: ids of tokens that end a text, beside the tokenizer's EOS.
        batch_size: texts of the greatest length that a micro-batch may hold.
    """

    def __init__(
        self, parallel: ParallelModel, tokenizer: Any, *, add_bos: bool, ends: Set[int], batch_size: int
    ) -> None:
        super().__init__()
        self._parallel, self._model, self.tokenizer = parallel, parallel.on_ranks, tokenizer
        self._add_bos, self._batch_size = add_bos, batch_size
        self._ends = ends | {tokenizer.eos_token_id}
        self._device = parallel.mesh.device
        self.max_length: int = parallel.on_ranks.model.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that begins with the BOS token's own text gets no second one."""
        if add_special_tokens is None:
            starts = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
            add_special_tokens = self._add_bos and not starts
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, **kwargs)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages as the tokenizer's template writes them."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ---- likelihood ---------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(nats, whether greedy decoding says it) of each continuation; contexts too long lose their beginning."""
        # The continuations of each prefix, in the order in which they come: what is asked twice is computed once.
        wanted = [fitted(context, continuation, self.max_length) for _, context, continuation in requests]
        by_prefix: dict[Tokens, dict[Tokens, None]] = {}
        for prefix, answer in wanted:
            by_prefix.setdefault(prefix, {})[answer] = None
        questions = [Answers(prefix, tuple(answers)) for prefix, answers in by_prefix.items()]
        scored = self._log_likelihoods(questions)
        found = {
            (question.prefix, answer): score
            for number, question in enumerate(questions)
            for answer, score in zip(question.answers, scored[number], strict=True)
        }
        results = [(found[pair].nats, found[pair].is_greedy) for pair in wanted]
        for (text, _, _), result in zip(requests, results, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def _log_likelihoods(self, questions: Sequence[Answers]) -> dict[int, tuple[LogLikelihood, ...]]:
        longest = max((len(q.prefix) + len(answer) - 1 for q in questions for answer in q.answers), default=1)
        mine = self._model.log_likelihoods(questions, self._batch_size * longest)
        return merged(self._parallel.mesh.gather_objects(mine))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts in nats; those longer than the model reads, window by window."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(nats for nats, _ in scored))
        return totals

    # ---- generation ---------------------------------------------------------------------------------------------

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts that follow, greedy or sampled at a temperature, up to a stop sequence.

        A sampled token is a function of torch's seed, the number of the request, and the place of the token: not of the
        layout.
        """
        seed = torch.initial_seed()
        texts = []
        for first in range(0, len(requests), self._batch_size):
            batch = [request.args for request in requests[first : first + self._batch_size]]
            texts += self._generate(batch, first, seed)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generate(self, batch: Sequence[tuple[str, dict[str, Any]]], first: int, seed: int) -> list[str]:
        writings = [
            self._begin(context, settings, seed, first + i) for i, (context, settings) in enumerate(batch)
        ]
        decoding = Decoding(self._model, len(writings))
        new = {number: writing.context for number, writing in enumerate(writings)}
        while new:
            logits = decoding.next_logits(new)
            chosen = {number: writings[number].choose(logits_V) for number, logits_V in logits.items()}
            chosen = merged(self._parallel.mesh.gather_objects(chosen))
            for number, token in chosen.items():
                writings[number].add(token)
            new = {number: (token,) for number, token in chosen.items() if not writings[number].is_done}
        return [writing.text for writing in writings]

    def _begin(self, context: str, settings: dict[str, Any], seed: int, number: int) -> _Writing:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, 256))
        until = handle_stop_sequences(
            wanted.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id])
        )
        max_new_tokens, temperature = wanted.pop("max_gen_toks"), wanted.pop("temperature", 0.0)
        temperature = temperature if wanted.pop("do_sample", False) else 0.0
        unknown = {key: value for key, value in wanted.items() if _NEUTRAL.get(key) != value}
        if unknown:
            raise UserError(f"the parallel runner cannot generate with {unknown}: use --runner transformers")
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"--max-new-tokens is {max_new_tokens}; the model reads {self.max_length} tokens, with the prompt"
            )
        ids = tuple(self.tok_encode(context)[-room:]) or (self.prefix_token_id,)
        return _Writing(ids, until, max_new_tokens, temperature, (seed, number), self.tokenizer, self._ends)


class _Writing:
    """A text that grows by one token at a time."""

    def __init__(
        self,
        context: Tokens,
        until: list[str],
        max_new_tokens: int,
        temperature: float,
        seed: tuple[int, int],
        tokenizer: Any,
        ends: Set[int],
    ) -> None:
        self.context, self.tokens = context, []  # type: ignore[var-annotated]
        self._until, self._max_new_tokens, self._temperature = until, max_new_tokens, temperature
        self._seed, self._tokenizer, self._ends = seed, tokenizer, ends
        self._stopped = False

    @property
    def is_done(self) -> bool:
        return self._stopped or len(self.tokens) >= self._max_new_tokens

    @property
    def text(self) -> str:
        """What was written, up to the first stop sequence."""
        written = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        return postprocess_generated_text(written, self._until, None)

    def choose(self, logits_V: torch.Tensor) -> int:
        """The next token: the likeliest, or drawn at the temperature."""
        if self._temperature == 0:
            return int(logits_V.argmax())
        place = f"{self._seed[0]} {self._seed[1]} {len(self.tokens)}".encode()
        generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.sha256(place).digest()[:8], "little") >> 1
        )
        return int(torch.multinomial((logits_V / self._temperature).softmax(-1), 1, generator=generator))

    def add(self, token: int) -> None:
        """Take the next token; one that ends texts, or a stop sequence, ends it."""
        self.tokens.append(token)
        written = self._tokenizer.decode(self.tokens)
        self._stopped = token in self._ends or any(term and term in written for term in self._until)
