"""Sources that are written while they are converted: no mixture of two models is published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.convert.source_files import SourceFiles
from meditron_train.checkpoint.convert.to_hf import export_hf
from meditron_train.checkpoint.convert.to_rank_files import reshard
from tests.checkpoint.tiny_llama import write_tiny_llama
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
