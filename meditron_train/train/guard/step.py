"""One step of training, guarded: what is wrong is found before it reaches the weights.

After the gradients are known and before the update: is the step finite and usual (`anomalies`), are the copies of
the weights still equal (`replicas`)? A bad step is computed once more first: a passing fault of the hardware is then
gone, and the run stays what it would have been.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from meditron_train.config.schema import ResilienceSection
from meditron_train.data.packed import PackedBatch
from meditron_train.log import EVERY_RANK, get_logger
from meditron_train.train.engine import Engine, StepResult
from meditron_train.train.guard.anomalies import AnomalyMonitor
from meditron_train.train.guard.replicas import check_replicas, has_replicas
from meditron_train.train.guard.slow_ranks import SlowRank, SlowRankDetector

_log = get_logger(__name__)


@dataclass(frozen=True)
class GuardedStep:
    """A step, what was wrong with it (None: nothing), and whether the weights of the last checkpoint are wanted.

    `slow_ranks` is None except at the end of a window of measurement.
    """

    result: StepResult
    problem: str | None
    roll_back: bool
    slow_ranks: list[SlowRank] | None


class StepGuard:
    """Takes steps with `engine`; all of it is collective and decides alike on all ranks.

    Args:
        hosts: the host of each rank.
        history: of `AnomalyMonitor`, from a checkpoint.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ResilienceSection,
        hosts: Sequence[str],
        history: Iterable[tuple[float, float]],
    ) -> None:
        self.engine, self._settings, self._hosts = engine, settings, hosts
        self.monitor = AnomalyMonitor(settings, history)
        self._slow_ranks = SlowRankDetector(
            engine.mesh, hosts, factor=settings.slow_rank_factor, window=settings.slow_rank_window
        )

    def take_step(
        self,
        step: int,
        batches: Sequence[PackedBatch],
        lr: float,
        *,
        seconds_waited_for_data: float,
        is_saved: bool,
    ) -> GuardedStep:
        """Gradients, judgment and, unless something forbids it, the update.

        Args:
            is_saved: a checkpoint will be made after this step, so its weights must be sound.

        Raises:
            RequeueError, MeditronError: copies of the weights differ.
        """
        result = self.engine.compute_gradients(batches, step)
        slow_ranks = self._slow_ranks.add(seconds_waited_for_data + result.own_seconds)
        if not result.num_loss_tokens:  # nothing to learn from; weight decay alone must not move the weights
            if is_saved or self._is_check_due(step):
                self.check_replicas(step)
            return GuardedStep(replace(result, skipped=True), "has no label that counts", False, slow_ranks)
        problem = self.monitor.problem(result)
        if problem is not None and self._settings.retry_bad_steps:
            result, problem = self._retry(step, batches, problem)
        # After a bad step too: a flipped bit in a weight's exponent shows first as a loss that is not finite.
        if problem is not None or is_saved or self._is_check_due(step):
            self.check_replicas(step)
        action = self._settings.anomaly_action
        if problem is None or (result.is_finite and action == "report"):
            self.engine.update(result.grad_norm, lr)
            self.monitor.add(result)
            return GuardedStep(result, problem, roll_back=False, slow_ranks=slow_ranks)
        return GuardedStep(
            replace(result, skipped=True), problem, action == "rollback" and result.is_finite, slow_ranks
        )

    def check_replicas(self, step: int) -> None:
        """Compare the weights that several ranks hold, unless that is turned off."""
        if self._settings.replica_check_interval and has_replicas(self.engine.mesh.layout):
            check_replicas(self.engine, self._hosts, step, action=self._settings.on_replica_mismatch)

    def _is_check_due(self, step: int) -> bool:
        interval = self._settings.replica_check_interval
        return interval > 0 and step % interval == 0

    def _retry(
        self, step: int, batches: Sequence[PackedBatch], problem: str
    ) -> tuple[StepResult, str | None]:
        _log.warning("step %d %s: it is computed once more", step, problem, extra=EVERY_RANK)
        result = self.engine.compute_gradients(batches, step)
        still = self.monitor.problem(result)
        if still is None:
            _log.warning(
                "step %d was good the second time (loss %.4f): the first was a fault of the hardware, have it tested",
                *(step, result.loss),
                extra=EVERY_RANK,
            )
        return result, still
