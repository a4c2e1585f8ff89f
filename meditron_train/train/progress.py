"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far a run has come: what a checkpoint remembers beside the tensors.

    Attributes:
        step: last finished step; the data position follows from it.
        samples, tokens: consumed so far, skipped steps and padding included (tokens = samples x seq_len).
        num_skipped_steps: steps that changed no weight, or whose change was rolled back, so far.
        num_consecutive_skips: those at the end, without a good step after them.
        from_step: the checkpoint that the run last went back to on request (`train --from-step`).
        history: (loss, gradient norm) of the last good steps, which say what is usual (`anomalies`).
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    num_skipped_steps: int = 0
    num_consecutive_skips: int = 0
    from_step: int | None = None
    history: list[tuple[float, float]] = field(default_factory=list)
