"""Checkpoints of a run: save, publish, find the newest intact one, resume, export. Collective unless said."""

from __future__ import annotations

from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from meditron_train.checkpoint.adapters import adapter_facts
from meditron_train.checkpoint.convert.engine import NO_LIMITS
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.sharded.plan import meta_json
from meditron_train.checkpoint.sharded.ranks import ShardedSaver, load_sharded, write_companions
from meditron_train.checkpoint.sharded.read import read_meta
from meditron_train.checkpoint.sharded.store import CheckpointStore
from meditron_train.errors import MeditronError
from meditron_train.log import get_logger
from meditron_train.mcore import ShardedObject
from meditron_train.parallel import Mesh, free_port, rejoin
from meditron_train.planner.checkpoint_size import checkpoint_bytes
from meditron_train.report.status import RunStatus
from meditron_train.train.engine import Engine
from meditron_train.train.engine_state import load_state, sharded_state, use_mesh
from meditron_train.train.progress import Progress
from meditron_train.train.saving.exports import export_run
from meditron_train.train.saving.finished import find_export
from meditron_train.train.saving.forked_copy import ForkedCopy
from meditron_train.train.saving.resume import check_continues
from meditron_train.train.setup import Plan

_log = get_logger(__name__)


@dataclass
class _Unfinished:
    """A checkpoint between begin and publication; every stage is waited for on all ranks, then the next one begins.

    Attributes:
        stage: "writing" the tensors; "hashing" what this rank wrote; "publishing", by rank 0.
        outcome: what the stage gave on this rank, once it has ended here: (value,).
    """

    progress: Progress
    stage: str = "writing"
    copy: ForkedCopy | None = None
    job: Future | None = None
    outcome: tuple[Any] | None = None


class RunCheckpoints:
    """The checkpoints of one run, seen from one rank; rank 0 does what concerns names and manifests.

    With async_save on a CPU a forked copy of every rank does the whole saving, so training stands still for the fork
    alone. CUDA does not survive a fork: on a GPU the state is gathered and copied to the host first, and only the
    writing is left to a forked process. Hashing and publishing happen in a thread in either case.

    Attributes:
        num_published: checkpoints that this process has seen complete.
    """

    def __init__(self, plan: Plan, mesh: Mesh, directory: Path, status: RunStatus) -> None:
        self._plan, self._mesh, self._status = plan, mesh, status
        settings = plan.config.checkpoint
        self._is_async = settings.async_save
        self._forks = settings.async_save and not mesh.on_gpu
        self._store = CheckpointStore(directory, settings.keep_last, settings.keep_every)
        self._saver = ShardedSaver(mesh.groups.dp_cp, asynchronous=settings.async_save and mesh.on_gpu)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._unfinished: _Unfinished | None = None
        self.num_published = 0

    # ---- saving -------------------------------------------------------------------------------------------------

    def save(self, engine: Engine, progress: Progress, *, must: bool = False) -> None:
        """Save after `progress.step`; with async_save the files are finished later.

        One that is being written must have been waited for: an error of it is not this one's.

        Args:
            engine: whose state is saved.
            progress: of the run.
            must: without it the last steps are lost: on a full disk it takes the place of an old checkpoint.

        Raises:
            SaveError: the disk is full or fails; no leftovers, earlier checkpoints are untouched.
        """
        assert not self.is_writing
        directory, port = self._mesh.on_first_rank(lambda: self._begin(progress.step, must=must))
        self._unfinished = _Unfinished(replace(progress))
        self._together(lambda: self._start_writing(engine, directory, port))
        self.finish(wait=not self._is_async)

    def finish(self, *, wait: bool) -> None:
        """Bring a checkpoint that is being written as far as it goes; with `wait`, until it is published.

        Cheap when there is none.

        Raises:
            SaveError: as `save`.
        """
        while (unfinished := self._unfinished) is not None:
            outcomes = self._together(lambda: self._outcome(unfinished, wait=wait))
            if None in outcomes:
                return
            self._begin_next_stage(unfinished, [value for (value,) in outcomes])

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is begun and not published yet."""
        return self._unfinished is not None

    def close(self) -> None:
        """Finish what is being written and stop the writers."""
        self.finish(wait=True)
        self._saver.close()
        self._thread.shutdown()

    def _start_writing(self, engine: Engine, directory: Path, port: int) -> None:
        assert self._unfinished is not None
        engine.gather_params()
        if self._forks:
            self._unfinished.copy = ForkedCopy(lambda: self._write_in_copy(engine, directory, port))
        else:
            self._saver.save(self._state(engine), directory)

    def _write_in_copy(self, engine: Engine, directory: Path, port: int) -> None:
        mesh = rejoin(self._mesh, port, timeout_s=self._plan.config.resilience.hang_other_s)
        use_mesh(engine, mesh)
        ShardedSaver(mesh.groups.dp_cp, asynchronous=False).save(self._state(engine), directory)

    def _outcome(self, unfinished: _Unfinished, *, wait: bool) -> tuple[Any] | None:
        """(what the stage gave,) once it has ended on this rank, else None."""
        if unfinished.outcome is None:
            if unfinished.job is not None:
                if wait or unfinished.job.done():
                    unfinished.outcome = (unfinished.job.result(),)
            elif (unfinished.copy or self._saver).finished(wait=wait):
                unfinished.outcome = (None,)
        return unfinished.outcome

    def _begin_next_stage(self, unfinished: _Unfinished, values: list[Any]) -> None:
        """The stage has ended on all ranks and gave `values`, in rank order."""
        unfinished.outcome = None
        if unfinished.stage == "writing":
            unfinished.stage = "hashing"
            unfinished.job = self._thread.submit(self._hash, unfinished.progress)
        elif unfinished.stage == "hashing":
            unfinished.stage = "publishing"
            entries = {name: entry for of_rank in values for name, entry in of_rank.items()}
            step = unfinished.progress.step
            is_first = self._mesh.rank == 0
            unfinished.job = self._thread.submit(
                lambda: self._store.publish(step, entries) if is_first else None
            )
        else:
            self._unfinished = None
            self.num_published += 1
            self._status.update(last_checkpoint=values[0].name)
            _log.info("saved %s", values[0])

    def _hash(self, progress: Progress) -> dict[str, dict[str, int | str]]:
        """Manifest entries of what this rank wrote; on rank 0 also of the companions, which it writes first."""
        is_first = self._mesh.rank == 0
        if is_first:
            write_companions(
                self._store.unfinished_path(progress.step),
                self._meta(progress),
                self._plan.model,
                self._plan.config.data.tokenizer,
                self._plan.config.data.special_tokens,
                self._plan.chat,
            )
        return self._store.describe_files(progress.step, self._mesh.rank, with_shared=is_first)

    def _begin(self, step: int, *, must: bool) -> tuple[Path, int]:
        needed_bytes = checkpoint_bytes(self._plan.config, self._plan.model)
        if must:
            self._store.make_room(step, needed_bytes)
        self._store.check_free_space(needed_bytes)
        return self._store.begin(step), free_port() if self._forks else 0

    def _meta(self, progress: Progress) -> dict[str, Any]:
        counters, lora = asdict(progress), self._plan.config.lora
        known = meta_json(
            self._plan.model,
            self._plan.padded_vocab_size,
            step=counters.pop("step"),
            tokens=counters.pop("tokens"),
            samples=counters.pop("samples"),
            layout=asdict(self._plan.layout),
            config=self._plan.config.model_dump(mode="json", by_alias=True),
            contains=("adapters", "optimizer") if lora else ("model", "optimizer"),
        )
        adapters = adapter_facts(lora, self._plan.config.model.from_, self._plan.base_sha256) if lora else {}
        return {
            **known,
            **adapters,
            **counters,
            "data_fingerprint": self._plan.train_data.fingerprint_until(progress.samples),
        }

    def _state(self, engine: Engine) -> dict[str, Any]:
        state = sharded_state(engine, with_optimizer=True, is_loading=False)
        state["rng"] = self._rng_state(torch.get_rng_state())
        return state

    def _rng_state(self, state: torch.Tensor | None) -> ShardedObject:
        layout = self._plan.layout
        return ShardedObject("rng", state, (layout.world_size,), (self._mesh.rank,))

    # ---- resuming -----------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest intact checkpoint, after leftovers were removed; says which ones had to be skipped.

        Raises:
            MeditronError: there are checkpoints, but every one is damaged.
        """

        def find() -> Path | None:
            for name in self._store.clean():
                _log.info("removed %s, which was never finished", name)
            path, skipped = self._store.newest_intact()
            for broken, problems in skipped:
                _log.warning(
                    "skipping the checkpoint %s, which is not intact: %s", broken, "; ".join(problems)
                )
            if path is None and skipped:
                raise MeditronError(
                    f"none of the {len(skipped)} checkpoints in {self._store.directory} is intact. Restore one, or "
                    "start again in another logging.run_dir"
                )
            return path

        return self._mesh.on_first_rank(find)

    def load(self, engine: Engine, directory: Path) -> Progress:
        """Continue from a checkpoint of this run, written under any layout.

        Raises:
            UserError: it is of another model, of other data, or further than this run is to go.
        """
        meta = read_meta(directory)
        check_continues(self._plan, directory)
        state = sharded_state(engine, with_optimizer=True, is_loading=True)
        same_layout = meta.get("layout") == asdict(self._plan.layout)
        if same_layout:
            state["rng"] = self._rng_state(None)
        loaded = load_sharded(state, directory)
        load_state(engine, loaded)
        if same_layout:
            torch.set_rng_state(loaded["rng"])
        progress = Progress(**{name: meta[name] for name in asdict(Progress()) if name in meta})
        _log.info("resuming from %s, after step %d", directory, progress.step)
        return progress

    # ---- export -------------------------------------------------------------------------------------------------

    def has(self, step: int) -> bool:
        """Whether the checkpoint of `step` is finished and kept; collective."""
        return self._mesh.on_first_rank(lambda: self._store.path(step).is_dir())

    def without_export(self, steps: Container[int], directory: Callable[[int], Path]) -> list[int]:
        """Those of `steps` whose checkpoints are kept, in full, and not exported, ascending; collective.

        Args:
            steps: to look at.
            directory: where the export of a step should lie.
        """

        def find() -> list[int]:
            kept = [(step, self._store.path(step)) for step in self._store.steps() if step in steps]
            whole = [(step, path) for step, path in kept if not verify_manifest(path, check_hashes=False)]
            return [step for step, path in whole if find_export(path, directory(step)) is None]

        return self._mesh.on_first_rank(find)

    def export(self, step: int, hf_directory: Path) -> None:
        """Write the checkpoint of `step` as a Hugging Face directory, or its adapters as one of PEFT.

        It takes the place of an unchanged earlier export. Rank 0 writes, the others wait.
        """
        self.finish(wait=True)
        limits = replace(NO_LIMITS, allow_nonfinite=self._plan.config.model.allow_nonfinite)
        self._mesh.on_first_rank(lambda: export_run(self._store.path(step), hf_directory, limits))

    # ---- errors on one rank are errors on all -------------------------------------------------------------------

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """`action()` on all ranks; its values in rank order. A failure on one gives the checkpoint up on all."""
        value, failure = None, None
        try:
            value = action()
        except (
            Exception,
            CheckpointException,
        ) as error:  # the latter is a BaseException; explained and raised below
            failure = error
        outcomes = self._mesh.gather_objects((value, None if failure is None else repr(failure)))
        failures = [said for _, said in outcomes if said is not None]
        if not failures:
            return [outcome for outcome, _ in outcomes]
        assert self._unfinished is not None
        unfinished, self._unfinished = self._unfinished, None
        if unfinished.copy is not None:
            unfinished.copy.kill()
        cause = failure if failure is not None else RuntimeError(failures[0])
        raise self._mesh.on_first_rank(
            lambda: self._store.failed(unfinished.progress.step, cause)
        ) from failure
