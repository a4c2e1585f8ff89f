"""Whatever reads a checkpoint refuses one whose pickles could run code, names it, and runs nothing."""

from __future__ import annotations

import functools
import io
import pickle
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner

from meditron_train.checkpoint.hf.read import HFSource
from meditron_train.checkpoint.megatron.source import MegatronSource
from meditron_train.checkpoint.sharded.checked_reader import CheckedReader, read_common
from meditron_train.checkpoint.sharded.metadata import read_metadata
from meditron_train.checkpoint.sharded.read import ShardedSource
from tests.checkpoint.files.payloads import FORBIDDEN, PLANTED, Reduced, forbidden
from tests.checkpoint.sharded.test_read import write_checkpoint
from tests.refusal import refused

NORM = "decoder.final_layernorm.weight"


def torch_file(raw: bytes) -> bytes:
    """A file of torch.save with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def old_torch_file(raw: bytes) -> bytes:
    before = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(value, protocol=2) for value in before) + raw + pickle.dumps([], protocol=2)


@functools.cache
def _whole() -> tempfile.TemporaryDirectory[str]:
    """A checkpoint to copy; removed with this process."""
    directory = tempfile.TemporaryDirectory(prefix="meditron-checkpoint-")
    write_checkpoint(Path(directory.name, "checkpoint"))
    return directory


def copy_checkpoint(directory: Path) -> None:
    shutil.copytree(Path(_whole().name, "checkpoint"), directory)


def replace_record(checkpoint: Path, name: str, raw: bytes) -> None:
    """The record of an entry is now at the end of its file, and `.metadata` says so."""
    metadata = read_metadata(checkpoint)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == name)
    file = checkpoint / place.relative_path
    place.offset, place.length = file.stat().st_size, len(raw)
    with file.open("ab") as out:
        out.write(raw)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_metadata(directory: Path, raw: bytes) -> Callable[[], object]:
    copy_checkpoint(directory)
    (directory / ".metadata").write_bytes(raw)
    return lambda: CheckedReader(directory)


def in_common(directory: Path, raw: bytes) -> Callable[[], object]:
    copy_checkpoint(directory)
    (directory / "common.pt").write_bytes(torch_file(raw))
    return lambda: read_common(directory)


def in_a_tensor_for_conversion(directory: Path, raw: bytes) -> Callable[[], object]:
    copy_checkpoint(directory)
    replace_record(directory, NORM, torch_file(raw))
    return lambda: ShardedSource(directory).read(NORM)


def in_a_tensor_for_training(directory: Path, raw: bytes) -> Callable[[], object]:
    copy_checkpoint(directory)
    replace_record(directory, NORM, torch_file(raw))
    state = {NORM: torch.empty(24, dtype=torch.bfloat16)}
    return lambda: _load(state, directory)


def in_an_object(directory: Path, raw: bytes) -> Callable[[], object]:
    copy_checkpoint(directory)
    metadata = read_metadata(directory)
    metadata.state_dict_metadata[NORM] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    metadata.storage_data = {
        type(index)(index.fqn): place for index, place in metadata.storage_data.items() if index.fqn == NORM
    }
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    replace_record(directory, NORM, torch_file(raw))
    return lambda: _load({NORM: io.BytesIO()}, directory)


def _load(state: dict, directory: Path) -> None:
    """As megatron-core does on each rank; the error of a rank comes out alone."""
    reader, planner = CheckedReader(directory), DefaultLoadPlanner()
    planner.set_up_planner(state, reader.read_metadata(), True)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    reader.read_data(planner.create_local_plan(), planner)


def in_a_rank_file(directory: Path, raw: bytes) -> Callable[[], object]:
    (directory / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (directory / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(torch_file(raw))
    return lambda: MegatronSource(directory / "iter_0000001")


def in_a_bin(directory: Path, raw: bytes) -> Callable[[], object]:
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(torch_file(raw))
    return lambda: HFSource(directory)


def in_an_old_bin(directory: Path, raw: bytes) -> Callable[[], object]:
    read = in_a_bin(directory, raw)
    (directory / "pytorch_model.bin").write_bytes(old_torch_file(raw))
    return read


PLACES = [
    (in_metadata, ".metadata: the pickle refers to "),
    (in_common, "common.pt: the pickle refers to "),
    (in_a_tensor_for_conversion, f".distcp: the record of {NORM} refers to "),
    (in_a_tensor_for_training, f".distcp: the record of {NORM} refers to "),
    (in_an_object, f".distcp: the record of {NORM} refers to "),
    (in_a_rank_file, "model_optim_rng.pt: the pickle refers to "),
    (in_a_bin, "pytorch_model.bin: the pickle refers to "),
    (in_an_old_bin, "pytorch_model.bin: the pickle refers to "),
]


@pytest.mark.parametrize(("place", "said"), PLACES, ids=lambda value: getattr(value, "__name__", ""))
def test_no_payload_runs_anywhere(tmp_path: Path, monkeypatch, place, said: str) -> None:
    (tmp_path / "planted").mkdir()
    marker = tmp_path / "was_run"
    (tmp_path / "planted" / f"{PLANTED}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path / "planted")
    for number, payload in enumerate(FORBIDDEN):
        read = place(tmp_path / str(number), forbidden(marker)[payload])
        with refused(said, "Refused, as it could run code"):
            read()
        assert not marker.exists() and PLANTED not in sys.modules, payload


def test_the_payloads_do_run_where_pickle_loads_them(tmp_path: Path, monkeypatch) -> None:
    """What is refused above is not harmless by mistake."""
    ran = []
    (tmp_path / "planted").mkdir()
    marker = tmp_path / "was_run"
    (tmp_path / "planted" / f"{PLANTED}.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path / "planted")
    for payload in (
        "os.system",
        "eval",
        "INST of protocol 0",
        "OBJ",
        "text arguments of protocol 0",
        PLANTED,
    ):
        raw = forbidden(marker).get(payload, forbidden(marker)["a module with side effects"])
        with suppress(Exception):  # after the harm
            pickle.loads(raw)
        ran.append(marker.exists())
        marker.unlink(missing_ok=True)
    sys.modules.pop(PLANTED, None)
    assert ran == [True] * 6


def test_a_changed_file_between_check_and_load_cannot_matter(tmp_path: Path) -> None:
    """Nothing but our reader opens the files: torch gets an object that was written again from what was read."""
    directory = tmp_path / "checkpoint"
    read = in_an_object(directory, pickle.dumps({"step": 3, "list": [1.5, None]}))
    read()
    state = {NORM: io.BytesIO()}
    _load(state, directory)
    assert state[NORM] == {"step": 3, "list": [1.5, None]}


def test_inspection_opens_every_pickle(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_checkpoint(checkpoint)
    assert ShardedSource(checkpoint).pickle_problems() == []
    payload = pickle.dumps(Reduced(print, ("x",)))
    replace_record(checkpoint, NORM, torch_file(payload))
    (checkpoint / "common.pt").write_bytes(torch_file(payload))
    problems = ShardedSource(checkpoint).pickle_problems()
    assert [problem.partition(": ")[0].rpartition("/")[2] for problem in problems] == [
        "__0_0.distcp",
        "common.pt",
    ]
    assert all("refers to builtins.print" in problem for problem in problems)


def test_a_record_of_another_dtype_is_refused(tmp_path: Path) -> None:
    """`.metadata` says bfloat16: a cast without a word would be taken for the model."""
    checkpoint = tmp_path / "checkpoint"
    tensors = write_checkpoint(checkpoint)
    raw = io.BytesIO()
    torch.save(tensors[NORM].float(), raw)
    replace_record(checkpoint, NORM, raw.getvalue())
    with refused(f"the record of {NORM} is not a tensor", "torch.bfloat16"):
        ShardedSource(checkpoint).read(NORM)
    with refused(f"the record of {NORM} is not a tensor", "torch.bfloat16"):
        _load({NORM: torch.empty(24, dtype=torch.bfloat16)}, checkpoint)
