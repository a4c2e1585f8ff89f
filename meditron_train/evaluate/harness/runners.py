"""Who computes: models as the lm-evaluation-harness sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meditron_train.checkpoint.hf.directory import end_token_ids
from meditron_train.checkpoint.hf.read import open_hf_model
from meditron_train.config.training import ParallelSection
from meditron_train.errors import UserError
from meditron_train.evaluate.language_model import check_generation_config
from meditron_train.launcher.environment import LaunchEnvironment
from meditron_train.tokenizer.reading import open_tokenizer

RUNNERS = ("transformers", "parallel", "vllm")
_LOCAL = {
    "local_files_only": True,
    "trust_remote_code": False,
}  # no network, no code out of a model's directory
INSTALL = "pip install 'meditron-train[eval]'"


def require_harness() -> None:
    """Check that lm-eval is installed.

    Raises:
        UserError: it is missing; says what to install.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise UserError(f"evaluate needs the lm-evaluation-harness: {INSTALL}") from None


def open_runner(
    name: str, directory: Path, *, device: str, batch_size: int, dtype: str, chat: bool = False
) -> Any:
    """An lm_eval `LM` over a Hugging Face directory.

    A BOS token precedes every prompt exactly where training puts one: where the tokenizer adds it, and in a
    conversation where the template writes it.

    Args:
        name: of the runner.
        directory: of the model.
        device: as torch names it.
        batch_size: texts at a time.
        dtype: of the weights and activations.
        chat: prompts are written by the chat template.

    Raises:
        UserError: the runner is unknown or not installed, or the vocabulary disagrees with the tokenizer.
    """
    require_harness()
    open_hf_model(directory)  # our own messages for missing shards, other architectures and adapters
    check_generation_config(directory)
    tokenizer = open_tokenizer(directory)
    _check_vocabulary(directory, len(tokenizer))
    add_bos = not chat and _adds_bos(tokenizer)
    if name == "transformers":
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=str(directory),
            tokenizer=tokenizer,
            device=device,
            batch_size=batch_size,
            dtype=dtype,
            add_bos_token=add_bos,
            **_LOCAL,
        )
    if name == "vllm":
        try:
            from lm_eval.models.vllm_causallms import VLLM

            return VLLM(
                pretrained=str(directory),
                dtype=dtype,
                batch_size=batch_size,
                add_bos_token=add_bos,
                trust_remote_code=False,
            )
        except (ImportError, ModuleNotFoundError):
            raise UserError("--runner vllm: vllm is not installed: pip install vllm (GPU only)") from None
    raise UserError(f"the runner {name!r} is unknown; known are {', '.join(RUNNERS)}")


def open_parallel_runner(
    directory: Path,
    launch: LaunchEnvironment,
    parallel: ParallelSection,
    *,
    device: str,
    batch_size: int,
    dtype: str,
    chat: bool = False,
) -> Any:
    """An lm_eval `LM` over a Hugging Face directory or a sharded checkpoint on all ranks of this job; collective.

    BOS tokens are as those of `open_runner`.

    Raises:
        UserError: as `open_parallel_model`, or the vocabulary disagrees with the tokenizer, or there is none.
    """
    require_harness()
    import torch

    from meditron_train.evaluate.harness.parallel_lm import ParallelLM
    from meditron_train.evaluate.parallel_model import open_parallel_model

    model = open_parallel_model(directory, launch, parallel, dtype=getattr(torch, dtype), device=device)
    tokenizer = open_tokenizer(model.tokenizer)
    _check_vocabulary(model.tokenizer, len(tokenizer))
    add_bos, ends = not chat and _adds_bos(tokenizer), end_token_ids(model.tokenizer)
    return ParallelLM(model, tokenizer, add_bos=add_bos, ends=ends, batch_size=batch_size)


def _check_vocabulary(directory: Path, num_tokens: int) -> None:
    from transformers import AutoConfig

    rows = AutoConfig.from_pretrained(directory, **_LOCAL).vocab_size
    if num_tokens > rows:
        raise UserError(
            f"{directory}: the tokenizer has {num_tokens} tokens, the model's embedding {rows} rows: they do not "
            "belong together"
        )


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id
