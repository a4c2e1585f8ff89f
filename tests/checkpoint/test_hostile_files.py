"""Every file that another program or person wrote is refused with its name, or read: at once, in little memory, without
a traceback. What is tried is made from whole files by changes that keep their structure."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from meditron_train.checkpoint.convert.from_hf import hf_to_sharded
from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.hf.read import open_hf_model
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.checkpoint.megatron.source import MegatronOptions, MegatronSource
from meditron_train.checkpoint.sharded.checked_reader import check_format, read_common
from meditron_train.checkpoint.sharded.metadata import read_metadata
from meditron_train.checkpoint.sharded.read import ShardedSource
from meditron_train.errors import UserError
from tests.checkpoint.megatron.fixtures import edited, lm_args, write_legacy
from tests.checkpoint.tiny_llama import read_tensors, write_tiny_llama
from tests.hostile import ODD, attempt_many, changed, check, spoiled
from tests.long import mostly_long


class Models:
    """Whole directories of every form, whose files are spoiled one after the other."""

    def __init__(self, root: Path) -> None:
        self.hf = write_tiny_llama(root / "hf")
        config = json.loads((self.hf / "config.json").read_text())
        config.setdefault("rope_theta", 10000.0)
        tensors = read_tensors(self.hf)
        bin_directory = root / "bin"
        bin_directory.mkdir()
        (bin_directory / "config.json").write_bytes((self.hf / "config.json").read_bytes())
        torch.save(tensors, bin_directory / "pytorch_model.bin")
        old = root / "old"
        old.mkdir()
        (old / "config.json").write_bytes((self.hf / "config.json").read_bytes())
        torch.save(tensors, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        self.bin, self.old = bin_directory, old
        self.sharded = root / "sharded"
        hf_to_sharded(self.hf, self.sharded)
        args = lm_args(config, vocab_size=131)
        self.args = args
        self.megatron = write_legacy(root / "megatron", tensors, args, style="mcore", padded_vocab_size=256)
        self.rank_file = self.megatron / "iter_0001000" / "mp_rank_00" / "model_optim_rng.pt"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def json_reader(path: Callable[[Models], Path], read: Callable[[Models], object]) -> Callable[..., None]:
    def attempt(models: Models, dice: random.Random) -> None:
        file = path(models)
        whole = file.read_bytes()
        try:
            if dice.random() < 0.8:
                file.write_text(json.dumps(changed(json.loads(whole), dice)))
            else:
                file.write_bytes(spoiled(whole, dice))
            check(lambda: read(models))
        finally:
            file.write_bytes(whole)

    return attempt


def bytes_reader(path: Callable[[Models], Path], read: Callable[[Models], object]) -> Callable[..., None]:
    def attempt(models: Models, dice: random.Random) -> None:
        file = path(models)
        whole = file.read_bytes()
        try:
            file.write_bytes(spoiled(whole, dice))
            check(lambda: read(models))
        finally:
            file.write_bytes(whole)

    return attempt


def safetensors_header(models: Models, dice: random.Random) -> None:
    file = models.hf / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.dumps(changed(json.loads(whole[8 : 8 + size]), dice)).encode()
    try:
        file.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + size :])
        check(lambda: open_hf_model(models.hf))
    finally:
        file.write_bytes(whole)


def zip_record(models: Models, dice: random.Random) -> None:
    """The pickle of a torch.save file, inside a whole archive."""
    file = models.bin / "pytorch_model.bin"
    whole = file.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    records[name] = spoiled(records[name], dice)
    try:
        with zipfile.ZipFile(file, "w") as archive:
            for record, raw in records.items():
                archive.writestr(record, raw)
        check(lambda: open_hf_model(models.bin))
    finally:
        file.write_bytes(whole)


def megatron_args(models: Models, dice: random.Random) -> None:
    file = models.rank_file
    whole = file.read_bytes()
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    others = {"window_size": None, "rotary_seq_len_interpolation_factor": None, "window_attn_skip_freq": None}
    named = changed({**models.args, **sizes, **others}, dice)
    named = argparse.Namespace(**{str(key): value for key, value in named.items()})
    content: dict[str, Any] = {"args": named, "checkpoint_version": 3.0, "iteration": 1000}
    if dice.random() < 0.2:
        content[dice.choice(list(content))] = dice.choice(ODD)
    try:
        with edited(file) as stored:
            stored.update(content)
        check(lambda: MegatronSource(models.megatron))
    finally:
        file.write_bytes(whole)


def metadata_fields(models: Models, dice: random.Random) -> None:
    """One field of one object in `.metadata`, of another type or size."""
    file = models.sharded / ".metadata"
    whole = file.read_bytes()
    metadata = pickle.loads(whole)
    targets: list[Any] = [metadata, *metadata.state_dict_metadata.values(), *metadata.storage_data.values()]
    targets += [chunk for entry in metadata.state_dict_metadata.values() for chunk in entry.chunks]
    target = dice.choice(targets)
    field = dice.choice(list(vars(target)))
    odd = dice.choice([*ODD, torch.Size([2**40, 0]), torch.float32, io.BytesIO(), ("a",), (2**62,) * 9])
    setattr(target, field, odd)
    try:
        file.write_bytes(pickle.dumps(metadata))
        check(lambda: ShardedSource(models.sharded))
    finally:
        file.write_bytes(whole)


READERS: dict[str, Callable[[Models, random.Random], None]] = {
    "config.json": json_reader(lambda m: m.hf / "config.json", lambda m: read_hf_config(m.hf)),
    "meta.json": json_reader(lambda m: m.sharded / "meta.json", lambda m: ShardedSource(m.sharded)),
    "metadata.json": json_reader(lambda m: m.sharded / "metadata.json", lambda m: check_format(m.sharded)),
    "manifest.json": json_reader(lambda m: m.sharded / "manifest.json", lambda m: verify_manifest(m.sharded)),
    "safetensors header": safetensors_header,
    "safetensors bytes": bytes_reader(lambda m: m.hf / "model.safetensors", lambda m: open_hf_model(m.hf)),
    ".metadata fields": metadata_fields,
    ".metadata bytes": bytes_reader(lambda m: m.sharded / ".metadata", lambda m: read_metadata(m.sharded)),
    "common.pt": bytes_reader(lambda m: m.sharded / "common.pt", lambda m: read_common(m.sharded)),
    "records": bytes_reader(
        lambda m: m.sharded / "__0_0.distcp", lambda m: ShardedSource(m.sharded).pickle_problems()
    ),
    ".bin pickle": zip_record,
    ".bin bytes": bytes_reader(lambda m: m.bin / "pytorch_model.bin", lambda m: open_hf_model(m.bin)),
    "old .bin bytes": bytes_reader(lambda m: m.old / "pytorch_model.bin", lambda m: open_hf_model(m.old)),
    "Megatron arguments": megatron_args,
    "Megatron bytes": bytes_reader(
        lambda m: m.rank_file, lambda m: MegatronSource(m.megatron, MegatronOptions(vocab_size=131))
    ),
    "tracker": bytes_reader(
        lambda m: m.megatron / "latest_checkpointed_iteration.txt", lambda m: MegatronSource(m.megatron)
    ),
}


@pytest.mark.parametrize("times", mostly_long([50, 200], 50))
@pytest.mark.parametrize("reader", READERS)
def test_readers_refuse_or_read(models: Models, reader: str, times: int) -> None:
    attempt_many(lambda dice: READERS[reader](models, dice), times, derandomize=True)


@pytest.mark.long
@pytest.mark.parametrize("reader", READERS)
def test_readers_refuse_or_read_2000_times(models: Models, reader: str) -> None:
    attempt_many(lambda dice: READERS[reader](models, dice), 2000, derandomize=False)


@pytest.mark.parametrize("name", ["config.json", "meta.json", "manifest.json", "metadata.json"])
@pytest.mark.parametrize(
    "raw", ["[" * 200_000, '{"a": ' * 100_000, "9" * 5000, '{"n": ' + "9" * 5000 + "}", '"\\ud800"', ""]
)
def test_json_of_any_shape(models: Models, name: str, raw: str) -> None:
    read = {
        "config.json": lambda: read_hf_config(models.hf),
        "meta.json": lambda: ShardedSource(models.sharded),
        "manifest.json": lambda: verify_manifest(models.sharded),
        "metadata.json": lambda: check_format(models.sharded),
    }[name]
    file = (models.hf if name == "config.json" else models.sharded) / name
    whole = file.read_bytes()
    try:
        file.write_text(raw)
        if name != "manifest.json":
            with pytest.raises(UserError, match=name):
                read()
        else:
            assert "cannot be read" in verify_manifest(models.sharded)[0]
        check(read)
    finally:
        file.write_bytes(whole)


def test_pipes_are_no_files(models: Models) -> None:
    """Opening one would wait for a writer for ever."""
    for file, read in (
        (models.hf / "config.json", lambda: read_hf_config(models.hf)),
        (models.sharded / ".metadata", lambda: read_metadata(models.sharded)),
        (models.sharded / "common.pt", lambda: read_common(models.sharded)),
        (models.sharded / "__0_0.distcp", lambda: ShardedSource(models.sharded)),
        (models.bin / "pytorch_model.bin", lambda: open_hf_model(models.bin)),
        (models.sharded / "metadata.json", lambda: check_format(models.sharded)),
        (models.megatron / "latest_checkpointed_iteration.txt", lambda: MegatronSource(models.megatron)),
    ):
        kept = file.rename(file.with_name("kept"))
        os.mkfifo(file)
        try:
            with pytest.raises(UserError):
                read()
        finally:
            file.unlink()
            kept.rename(file)
    kept = (models.sharded / "manifest.json").rename(models.sharded.parent / "kept")
    os.mkfifo(models.sharded / "manifest.json")
    assert "cannot be read" in verify_manifest(models.sharded)[0]
    kept.rename(models.sharded / "manifest.json")


def test_zip_bombs(models: Models) -> None:
    file = models.bin / "pytorch_model.bin"
    whole = file.read_bytes()
    try:
        for name, kind in (
            ("archive/data.pkl", zipfile.ZIP_DEFLATED),
            ("archive/byteorder", zipfile.ZIP_DEFLATED),
        ):
            with zipfile.ZipFile(file, "w", kind) as archive:
                with archive.open(name, "w", force_zip64=True) as record:
                    for _ in range(4):
                        record.write(bytes(16 << 20))
                if name != "archive/data.pkl":
                    archive.writestr("archive/data.pkl", b"\x80\x02}.")
            with pytest.raises(UserError, match="compressed or too large"):
                open_hf_model(models.bin)
            check(lambda: open_hf_model(models.bin))
    finally:
        file.write_bytes(whole)
