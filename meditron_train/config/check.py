"""Mistakes that no single key shows: everything that does not fit together, in one message.

Runs before any process group exists, so a wrong configuration costs a second, not a job on a cluster.
"""

from __future__ import annotations

from pathlib import Path

from meditron_train.config.model_config import ModelConfig
from meditron_train.config.schema import Config
from meditron_train.errors import UserError
from meditron_train.files import describe_missing_directory, overlap
from meditron_train.layout import ParallelLayout
from meditron_train.log import get_logger
from meditron_train.tokenizer.files import has_tokenizer

_log = get_logger(__name__)

RUN_SUBDIRECTORIES = (
    "checkpoints",
    "hf",
    "adapter",
    "logs",
    "profile",
    "tensorboard",
)  # of a run directory, whose files come and go


def check_config(
    config: Config,
    model: ModelConfig | None,
    world_size: int,
    *,
    model_problem: str | None = None,
    tokenizer_vocab_size: int | None = None,
    check_files: bool = True,
    with_warnings: bool = True,
) -> None:
    """Check `config` for `model` on `world_size` ranks.

    Args:
        config: the configuration.
        model: the model that will train, its vocabulary already extended by data.special_tokens; None when
            its files are missing, so that this is reported with everything else that is wrong.
        world_size: number of ranks.
        model_problem: why there is no model, where its files are there.
        tokenizer_vocab_size: tokens of the tokenizer, data.special_tokens included.
        check_files: the tokenizer, the model and the data must be on disk.
        with_warnings: log what is allowed but probably not intended.

    Raises:
        UserError: lists every mistake.
    """
    layout = config.parallel.layout(world_size)
    problems = layout.problems()
    sound_layout = not problems
    problems += [model_problem] if model_problem else []
    if model is not None:
        problems += _model_problems(config, model, layout, tokenizer_vocab_size)
    problems += _sequence_problems(config, layout)
    if sound_layout:
        problems += batch_problems(config, layout)
    profile = config.train.profile
    if profile.from_step is not None and max(profile.ranks) >= world_size:
        problems.append(
            f"train.profile.ranks names rank {max(profile.ranks)}: ranks go from 0 to {world_size - 1}"
        )
    problems += _schedule_problems(config)
    if check_files:
        problems += missing_files(config)
        problems += overwritten_inputs(config)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(
            f"the configuration has {count} on {world_size} {'rank' if world_size == 1 else 'ranks'}\n{listed}"
        )
    if with_warnings:
        for warning in _warnings(config, model):
            _log.warning("%s", warning)


def _model_problems(
    config: Config, model: ModelConfig, layout: ParallelLayout, tokenizer_vocab_size: int | None
) -> list[str]:
    """Parts of the model that cannot be split evenly, and a tokenizer that does not fit it."""
    found = []
    if tokenizer_vocab_size is not None and tokenizer_vocab_size > model.vocab_size:
        padded = model.padded_vocab_size(config.parallel.tensor, config.parallel.vocab_multiple)
        found.append(
            f"the tokenizer in {config.data.tokenizer} has {tokenizer_vocab_size} tokens but the model's "
            f"embedding has {model.vocab_size} ({padded} with padding, which holds no token); use the "
            "model's own tokenizer, and name tokens to add under data.special_tokens"
        )
    found += split_problems(model, layout)
    freeze = config.train.freeze
    if freeze.first_layers > model.num_layers or max(freeze.all_but_layers, default=0) >= model.num_layers:
        found.append(f"train.freeze names layers beyond the {model.num_layers} of the model, counted from 0")
    return found


def split_problems(model: ModelConfig, layout: ParallelLayout) -> list[str]:
    """Parts of the model that cannot be split evenly under a layout."""
    found = []
    if problem := layout.layer_problem(model.num_layers):
        found.append(f"{problem}; {_divisors(model.num_layers)}")
    for name, size in (
        ("attention heads", model.num_heads),
        ("key/value heads", model.num_kv_heads),
        ("columns of the MLP (intermediate size)", model.intermediate_size),
    ):
        if size % layout.tensor:
            found.append(
                f"{size} {name} are not divisible by parallel.tensor = {layout.tensor}; {_divisors(size)}"
            )
    return found


def micro_batch_problem(config: Config, layout: ParallelLayout) -> str | None:
    """Why the tokens of a micro-batch cannot be split evenly under a layout, in words; None where they can."""
    num_tokens = config.train.seq_len * config.train.micro_batch_size
    tokens = f"train.seq_len x train.micro_batch_size = {num_tokens} tokens"
    if layout.context > 1 and num_tokens % (2 * layout.context):
        return (
            f"{tokens} are not divisible by 2 x parallel.context = {2 * layout.context}: context parallelism "
            "gives each rank two equal slices"
        )
    if layout.sequence and (num_tokens // layout.context) % layout.tensor:
        return (
            f"{tokens} over parallel.context = {layout.context} are {num_tokens // layout.context} per rank, "
            f"not divisible by parallel.tensor = {layout.tensor}, as parallel.sequence needs"
        )
    return None


def _sequence_problems(config: Config, layout: ParallelLayout) -> list[str]:
    """Micro-batches that cannot be split evenly, and options of parallelism that need each other."""
    problem = micro_batch_problem(config, layout)
    found = [] if problem is None else [problem]
    if config.parallel.overlap_param_gather and not (
        config.parallel.distributed_optimizer and config.parallel.overlap_grad_reduce
    ):
        found.append(
            "parallel.overlap_param_gather needs parallel.distributed_optimizer and "
            "parallel.overlap_grad_reduce; set both to true, or it to false"
        )
    return found


def batch_problems(config: Config, layout: ParallelLayout) -> list[str]:
    """What keeps a global batch from being dealt to the ranks in whole micro-batches."""
    train, ramp = config.train, config.train.batch_ramp
    stages: tuple[int, ...] = (train.global_batch_size,)
    if ramp is not None:
        if problem := ramp_problem(config):
            return [problem]
        stages = ramp.stages(train.global_batch_size)
    found = []
    samples_per_pass = train.micro_batch_size * layout.data
    for size in stages:
        final = size == train.global_batch_size
        what = "train.global_batch_size" if final else "the train.batch_ramp stage of"
        if size % samples_per_pass:
            found.append(
                f"{what} {size} is not divisible by train.micro_batch_size x data-parallel size = "
                f"{train.micro_batch_size} x {layout.data} = {samples_per_pass}; the next possible size is "
                f"{-(-size // samples_per_pass) * samples_per_pass}"
            )
            continue
        num_microbatches = size // samples_per_pass
        if layout.virtual_pipeline > 1 and num_microbatches % layout.pipeline:
            found.append(
                f"{what} {size} makes {num_microbatches} micro-batches per rank, not divisible by "
                f"parallel.pipeline = {layout.pipeline}, as the interleaved schedule "
                "(parallel.virtual_pipeline > 1) needs"
            )
    return found


def ramp_problem(config: Config) -> str | None:
    """Why train.batch_ramp does not lead to the global batch size, in words; None where it does, or is absent."""
    ramp, size = config.train.batch_ramp, config.train.global_batch_size
    if ramp is None:
        return None
    if ramp.start > size:
        return f"train.batch_ramp.start {ramp.start} is above train.global_batch_size {size}"
    if (size - ramp.start) % ramp.increment:
        return (
            f"train.batch_ramp goes from {ramp.start} by {ramp.increment} and never reaches train.global_batch_size "
            f"{size} exactly; choose an increment that divides {size - ramp.start}"
        )
    return None


def _schedule_problems(config: Config) -> list[str]:
    """Learning rates and step numbers in the wrong order."""
    found = []
    steps, warmup_steps, decay_steps = config.train.steps, config.warmup_steps, config.decay_steps
    if config.optimizer.min_lr > config.optimizer.lr:
        found.append(
            f"optimizer.min_lr {config.optimizer.min_lr:g} is above optimizer.lr {config.optimizer.lr:g}"
        )
    if not config.knows_steps:
        return found  # the step numbers can be compared only once the data say how many there are
    if warmup_steps > steps:
        found.append(
            f"the warm-up of {warmup_steps} steps (schedule.warmup_steps or warmup_fraction) is longer than "
            f"train.steps {steps}"
        )
    elif config.schedule.kind in ("cosine", "linear") and decay_steps < warmup_steps:
        found.append(
            f"schedule.decay_steps {decay_steps} is below schedule.warmup_steps {warmup_steps}; "
            "it counts from the first step, warm-up included"
        )
    elif config.schedule.kind == "wsd" and warmup_steps + decay_steps > steps:
        found.append(
            f"schedule: warm-up of {warmup_steps} and final decay of {decay_steps} steps do not fit in "
            f"train.steps {steps}"
        )
    return found


def missing_files(config: Config) -> list[str]:
    """Files the run needs and that are not there, each with the key that names it."""
    found = []
    source = config.model.from_
    if source is not None:
        if not source.is_dir():
            found.append(f"model.from: {describe_missing_directory(source)}")
        elif not any((source / name).is_file() for name in ("config.json", "meta.json")):
            found.append(
                f"model.from: {source} is not a model: it has neither config.json (Hugging Face) nor meta.json "
                "(sharded checkpoint)"
            )
    return found + missing_data_files(config)


def missing_data_files(config: Config) -> list[str]:
    """The part of `missing_files` that belongs to the `data` section."""
    found = []
    tokenizer = config.data.tokenizer
    if not tokenizer.is_dir():
        found.append(f"data.tokenizer: {describe_missing_directory(tokenizer)}")
    elif not has_tokenizer(tokenizer):
        found.append(f"data.tokenizer: {tokenizer} has neither tokenizer.model nor tokenizer.json")
    for kind, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for entry in sources:
            missing = [str(file) for file in _dataset_files(entry.path) if not file.is_file()]
            if missing:
                found.append(
                    f"data.{kind} {entry.name!r}: missing {' and '.join(missing)}; "
                    f"make them with `meditron-train data tokenize ... --output {entry.path}`"
                )
    return found


def overwritten_inputs(config: Config) -> list[str]:
    """Inputs that lie where the run writes, or the other way around: saving and exporting could change or delete
    them."""
    run_dir = config.logging.run_dir
    models = {"model.from": config.model.from_, "data.tokenizer": config.data.tokenizer}
    inputs = {name: path for name, path in models.items() if path is not None}
    found = []
    for name, path in inputs.items():
        if name == "model.from" and path.resolve().parent == (run_dir / "checkpoints").resolve():
            continue  # one of the run's own checkpoints: a resume, which has read it before any is deleted
        if how := overlap(run_dir, path):
            found.append(f"logging.run_dir {run_dir} {how} {name} ({path}), which the run could change")
    for kind, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for file in {file for entry in sources for file in _dataset_files(entry.path)}:
            # A directory of a run may hold its data, but not where the run writes.
            for output in (run_dir / name for name in RUN_SUBDIRECTORIES):
                if how := overlap(output, file):
                    found.append(f"data.{kind}: {file} lies where the run writes: {output} {how} it")
    return [f"{problem}; give another logging.run_dir" for problem in found]


def _dataset_files(prefix: Path) -> tuple[Path, Path]:
    # Not with_suffix: a prefix may contain dots of its own ("pubmed.v2").
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def _warnings(config: Config, model: ModelConfig | None) -> list[str]:
    """What may be intended but should be noticed."""
    found = []
    # RoPE computes at any position, so this is a choice (context extension by theta), not an error.
    seq_len = config.train.seq_len
    if model is not None and seq_len > model.max_position_embeddings and model.rope.kind != "dynamic":
        found.append(
            f"train.seq_len {seq_len} is beyond the {model.max_position_embeddings} positions "
            f"of the model's config.json (RoPE: {model.rope.kind}, factor {model.rope.factor:g}); generation "
            "with the exported model may stop there"
        )
    late = [phase.from_step for phase in config.data.phases if phase.from_step > config.train.steps]
    if late and config.knows_steps:
        found.append(
            f"data.phases from step {late[0]} on are never reached: train.steps is {config.train.steps}"
        )
    first_profiled = config.train.profile.from_step or 0
    if first_profiled > config.train.steps and config.knows_steps:
        found.append(
            f"train.profile.from_step {first_profiled} is never reached: train.steps is {config.train.steps}"
        )
    if config.knows_steps and 2 * config.warmup_steps > config.train.steps:
        found.append(
            f"the learning rate rises during {config.warmup_steps} of the {config.train.steps} steps: "
            "schedule.warmup_steps says how many"
        )
    if config.parallel.sequence and config.parallel.tensor == 1:
        found.append("parallel.sequence has no effect with parallel.tensor = 1")
    return found


def _divisors(size: int) -> str:
    """ "possible: 1, 2, 4" for a message about divisibility."""
    possible = [str(divisor) for divisor in range(1, min(size, 128) + 1) if size % divisor == 0]
    return f"possible: {', '.join(possible)}"
