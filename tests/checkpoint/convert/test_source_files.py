"""Sources that are written while they are converted: no mixture of two models is published."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meditron_train.checkpoint.convert.engine import NO_LIMITS
from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.megatron_to_hf import megatron_to_hf
from meditron_train.checkpoint.convert.source_files import SourceFiles
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.convert.to_rank_files import reshard
from meditron_train.checkpoint.megatron.source import MegatronOptions
from tests.checkpoint.megatron.fixtures import lm_args, write_legacy
from tests.checkpoint.tiny_llama import read_tensors, write_tiny_llama
from tests.checkpoint.tiny_tokenizer import VOCAB_SIZE, write_tokenizer_model
from tests.refusal import refused


def rewriting(path: Path) -> Callable[..., None]:
    """Progress that writes the same number of other bytes into a file, once."""
    done: list[str] = []

    def progress(*_: object) -> None:
        if not done:
            done.append("x")
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b" " if path.suffix == ".json" else b"d")
            os.utime(path, ns=(0, 0))  # its time of change is another, whatever the clock's grain

    return progress


def test_no_mixture_is_published(tmp_path: Path) -> None:
    hf = write_tiny_llama(tmp_path / "hf")
    hf_to_sharded(hf, tmp_path / "ckpt")
    weights = hf / "model.safetensors"
    with refused(f"{hf} was changed while it was read (model.safetensors)", "could mix two models"):
        hf_to_sharded(hf, tmp_path / "other", progress=rewriting(weights))
    copy = shutil.copytree(tmp_path / "ckpt", tmp_path / "copy")
    config = copy / "hf" / "generation_config.json"
    with refused("was changed while it was read (hf/generation_config.json)"):
        export_hf(copy, tmp_path / "other", progress=rewriting(config))
    with refused("was changed while it was read (meta.json)"):
        reshard(
            tmp_path / "ckpt",
            tmp_path / "other",
            tp=1,
            pp=1,
            progress=rewriting(tmp_path / "ckpt" / "meta.json"),
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "copy", "hf"]


@pytest.mark.parametrize("change", ["written", "replaced", "added", "removed", "link"])
def test_every_change_is_seen(tmp_path: Path, change: str) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("a")
    files = SourceFiles(tmp_path, None)
    files.require_unchanged()
    if change == "written":
        (tmp_path / "a").write_text("x")
        os.utime(tmp_path / "a", ns=(0, 0))
    elif change == "replaced":
        status = (tmp_path / "a").stat()
        (tmp_path / "new").write_text("x")
        os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "new").rename(tmp_path / "a")
    elif change == "added":
        (tmp_path / "d").touch()
    elif change == "removed":
        (tmp_path / "a").unlink()
    else:
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("b")
    with refused("was changed while it was read"):
        files.require_unchanged()


def test_links_do_not_lead_away(tmp_path: Path) -> None:
    hf = write_tiny_llama(tmp_path / "hf")
    (hf / "everything").symlink_to("/")
    (hf / "additional_chat_templates").symlink_to("/")
    (hf / "weights").symlink_to(hf)
    start = time.perf_counter()
    files = SourceFiles(hf)
    files.require_unchanged()
    assert time.perf_counter() - start < 1
    (tmp_path / "elsewhere").mkdir()
    (hf / "hf").symlink_to(tmp_path / "elsewhere")
    files = SourceFiles(hf)
    (tmp_path / "elsewhere" / "config.json").touch()
    with refused("was changed while it was read (hf/config.json)"):
        files.require_unchanged()


def running(run: Path) -> Callable[..., None]:
    """Progress during which the run goes on: it logs, and saves another checkpoint."""

    def progress(*_: object) -> None:
        (run / "tensorboard").mkdir(exist_ok=True)
        for name in ("train.log", "tensorboard/events.out"):
            with (run / name).open("a") as file:
                file.write("x")
        if not (run / "iter_0002000").exists():
            shutil.copytree(run / "iter_0001000", run / "iter_0002000")
            (run / "latest_checkpointed_iteration.txt").write_text("2000")

    return progress


@pytest.mark.parametrize("format", ["mcore", "ranks"])
def test_a_run_that_goes_on_is_no_changed_source(tmp_path: Path, format: str) -> None:
    hf = write_tokenizer_model(write_tiny_llama(tmp_path / "hf", vocab_size=VOCAB_SIZE))
    config = {"rope_theta": 1e4, **json.loads((hf / "config.json").read_text())}
    run = write_legacy(
        tmp_path / "run", read_tensors(hf), lm_args(config), style="mcore", padded_vocab_size=512
    )
    write_tokenizer_model(run)
    if format == "mcore":
        megatron_to_hf(run, tmp_path / "out", MegatronOptions(), limits=NO_LIMITS, progress=running(run))
    else:
        reshard(run, tmp_path / "out", tp=1, pp=1, progress=running(run))
    with refused("iter_0002000 was changed while it was read (mp_rank_00/model_optim_rng.pt)"):
        megatron_to_hf(
            run,
            tmp_path / "other",
            MegatronOptions(),
            limits=NO_LIMITS,
            progress=rewriting(run / "iter_0002000" / "mp_rank_00" / "model_optim_rng.pt"),
        )
    with refused("run was changed while it was read (tokenizer.model)"):
        reshard(
            run,
            tmp_path / "other",
            tp=1,
            pp=1,
            progress=lambda *_: os.utime(run / "tokenizer.model", ns=(0, 0)),
        )
