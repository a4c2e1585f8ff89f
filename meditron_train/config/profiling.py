"""The keys that say which steps are profiled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from meditron_train.config.section import NUMBER, Count, Section


class ProfileSection(Section):
    """Steps that torch's profiler records, into RUN_DIR/profile/. They take longer than others and give the same
    numbers."""

    from_step: Count | None = None
    """The first step that is recorded (default: none is). The first steps of a run are not typical."""
    num_steps: Count = 2
    """How many steps are recorded. A trace of many is too large for the programs that show it."""
    ranks: tuple[Annotated[int, Field(ge=0), NUMBER], ...] = (0,)
    """The ranks that record theirs."""
    memory_history: bool = False
    """On GPUs, remember who allocated what, all through the run: the snapshot that is written when the memory does not
    suffice then names lines of code."""

    @model_validator(mode="after")
    def _check_ranks(self) -> ProfileSection:
        if not self.ranks:
            raise ValueError(
                "ranks is empty: name at least one rank, or leave from_step out to record nothing"
            )
        return self
