"""A benchmark as a task of the lm-evaluation-harness: its items, its prompt, its way to answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meditron_train.tasks.catalogue import Benchmark, Prompt, template_fields
from meditron_train.tasks.formats import Item
from meditron_train.tasks.questions import answer_of

Mode = Literal["likelihood", "cot", "sc-cot"]


@dataclass(frozen=True)
class Protocol:
    """How questions are asked.

    Attributes:
        mode: likelihood: the likeliest option wins. cot: the model reasons and its answer is read from the
            text. sc-cot: self-consistency (Wang et al. 2023): `branches` sampled reasonings, a majority vote.
        shots: examples shown, drawn from the train split with each of `seeds`.
        seeds: one run each.
        chat: questions are put as a user's message, by the chat template of the model's tokenizer; so are examples,
            with their answers.
    """

    mode: Mode = "likelihood"
    shots: int = 0
    seeds: tuple[int, ...] = (1234,)
    branches: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 512
    chat: bool = False

    @property
    def with_reasons(self) -> bool:
        """Whether the model reasons before it answers (open questions aside)."""
        return self.mode != "likelihood"


def make_task(
    benchmark: Benchmark, prompt: Prompt, items: Sequence[Item], examples: Sequence[Item], protocol: Protocol
) -> Any:
    """An lm_eval Task over the items.

    Args:
        prompt: of the protocol's mode.
        examples: to show; empty: the items themselves are shown.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask

    with_reasons = protocol.with_reasons and not benchmark.is_open

    def rows(shown: Sequence[Item]) -> Any:
        return datasets.Dataset.from_list(
            [
                {**template_fields(item), "target": answer_of(item, prompt, with_reasons=with_reasons)}
                for item in shown
            ]
        )

    splits = {"test": rows(items)}
    splits["train"] = rows(examples) if examples else splits["test"]
    config: dict[str, Any] = {
        "task": benchmark.name,
        "custom_dataset": lambda **_: splits,
        "test_split": "test",
        "fewshot_split": "train" if examples else "test",
        "num_fewshot": protocol.shots,
        "doc_to_text": prompt.question,
        "description": prompt.system,
        "target_delimiter": " ",
    }
    answers = "letters" if prompt.answer_with == "letter" else "options"
    if protocol.mode == "likelihood" and not benchmark.is_open:
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": answers,
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    else:
        config |= {
            "output_type": "generate_until",
            "doc_to_text": prompt.with_reasoning if with_reasons else prompt.question,
            "doc_to_target": "target",
            "repeats": protocol.branches,
            "generation_kwargs": {
                "until": ["\n\nQuestion:", "\n\nAbstract:", "\n\nContext:"],
                "max_gen_toks": protocol.max_new_tokens,
                **_sampling(protocol.temperature),
            },
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    return ConfigurableTask(config=config)


def _sampling(temperature: float) -> dict[str, Any]:
    """From the whole distribution: transformers would keep the 50 likeliest tokens, or what the model's own
    generation_config.json says."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
