"""The keys that say what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from meditron_train.config.chat import ChatSection, with_chat_tokens
from meditron_train.config.section import NUMBER, Count, Int, Name, NotNegative, Section


def _with_name(values: Any) -> Any:
    """A source's values, its name taken from the path where none is given."""
    if isinstance(values, dict) and values.get("name") is None and isinstance(values.get("path"), str | Path):
        return {**values, "name": Path(values["path"]).name}
    return values


class TrainSource(Section):
    """One corpus to train on."""

    name: Name = ""
    """Short name, used in metrics and traces (default: the last part of the path)."""
    path: Path
    """Prefix of the tokenized files: PATH.bin and PATH.idx."""
    weight: Annotated[float, Field(gt=0), NUMBER] | None = None
    """Relative share of the samples, on any scale (1.0 when neither weight nor token_budget is given)."""
    token_budget: Count | None = None
    """Tokens to take from this source over the run, instead of a weight."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        values = _with_name(values)
        if isinstance(values, dict) and values.get("weight") is None and values.get("token_budget") is None:
            return {**values, "weight": 1.0}
        return values

    @model_validator(mode="after")
    def _check_share(self) -> TrainSource:
        if self.weight is not None and self.token_budget is not None:
            raise ValueError(f"source {self.name!r} has both weight and token_budget; keep one")
        return self


class ValidationSource(Section):
    """One corpus to measure the validation loss on."""

    name: Name = ""
    """Short name; the loss is reported as validation_loss.NAME (default: the last part of the path)."""
    path: Path
    """Prefix of the tokenized files: PATH.bin and PATH.idx."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        return _with_name(values)


class Phase(Section):
    """From a step on, another mixture of the training sources."""

    from_step: Count
    """The first step with these weights."""
    weights: dict[Name, NotNegative]
    """Shares of the samples by name of source, on any scale; a source that is left out, or has 0, gives none."""

    @model_validator(mode="after")
    def _check_shares(self) -> Phase:
        if not any(self.weights.values()):
            raise ValueError(
                f"the phase from step {self.from_step} takes from no source; give one of them a weight"
            )
        return self


def check_order(phases: Sequence[Phase]) -> None:
    """Check that each phase begins after the one before.

    Raises:
        ValueError: the phases are out of order.
    """
    steps = [phase.from_step for phase in phases]
    if steps != sorted(set(steps)):
        raise ValueError(
            f"phases begin at the steps {steps}; give each a later from_step than the one before"
        )


class DataSection(Section):
    """What the model reads, and in which form."""

    tokenizer: Path
    """Directory with tokenizer.model (sentencepiece) or tokenizer.json."""
    packing: Literal["concat", "best_fit"] = "best_fit"
    """concat: one stream cut every seq_len, as in Megatron.
    best_fit: documents shorter than seq_len stay whole."""
    seed: Int = 1234
    """Seed of the sample order, which depends on it and on the sample number alone."""
    special_tokens: tuple[str, ...] = ()
    """Tokens added to the tokenizer, in this order."""
    chat: ChatSection | None = None
    """Of conversations; absent: all sources are plain text."""
    train: Annotated[tuple[TrainSource, ...], Field(min_length=1)]
    """Training sources, all by weight or all by token_budget."""
    phases: tuple[Phase, ...] = ()
    """Other weights from certain steps on, by ascending from_step. Those that begin after the last checkpoint may be
    changed on a resume; every source continues from where the previous phase left off."""
    validation: tuple[ValidationSource, ...] = ()
    """Validation sources."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1), NUMBER] = 0.0
    """Share of every training source's documents held out for validation. Which ones depends on their ids (their
    tokens, where they have none) alone: the same in every run."""
    prefetch: Annotated[int, Field(ge=0), NUMBER] = 2
    """Steps gathered ahead while the model works; 0: none."""
    cache_dir: Path | None = None
    """Where built sample indexes are kept (default: .index_cache beside the data, else a temporary directory)."""

    @model_validator(mode="before")
    @classmethod
    def _add_chat_tokens(cls, values: Any) -> Any:
        return with_chat_tokens(values)

    @model_validator(mode="after")
    def _check_sources(self) -> DataSection:
        if self.chat is not None and self.packing != "best_fit":
            raise ValueError("chat needs packing: best_fit; concat cuts conversations in two")
        held_out = [source.name for source in self.train] if self.validation_fraction > 0 else []
        for what, names in (
            ("train", [source.name for source in self.train]),
            ("validation", [source.name for source in self.validation] + held_out),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what} sources need different names; used twice: {', '.join(twice)}")
        budgeted = [source.name for source in self.train if source.token_budget is not None]
        if budgeted and len(budgeted) < len(self.train):
            weighted = [source.name for source in self.train if source.token_budget is None]
            raise ValueError(
                f"train sources mix token_budget ({', '.join(budgeted)}) and weight ({', '.join(weighted)}); "
                "give all of them the same kind"
            )
        check_order(self.phases)
        if self.phases and budgeted:
            raise ValueError("phases change weights; give the train sources weights instead of token_budget")
        unknown = {name for phase in self.phases for name in phase.weights} - {
            source.name for source in self.train
        }
        if unknown:
            raise ValueError(f"phases name {', '.join(sorted(unknown))}, which is not a train source")
        if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens:
            raise ValueError("special_tokens must be different and not empty")
        return self
