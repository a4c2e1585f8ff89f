"""torch.save files: found where torch finds them, written as torch writes them, damage and code refused."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from meditron_train.checkpoint.files.pickled import DamagedPickle, ForbiddenGlobal
from meditron_train.checkpoint.files.stored import read_stored
from meditron_train.checkpoint.files.torch_file import DamagedTorchFile, find_tensors, frame_record
from tests.checkpoint.tiny_llama import assert_same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def find(path: Path, start: int = 0, num_bytes: int | None = None) -> Any:
    with path.open("rb") as file:
        return find_tensors(file.fileno(), start, num_bytes)


@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (0, 3), (300, 33)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_around_the_bytes_is_what_torch_loads(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = (torch.randn(shape) * 9).to(dtype).contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    frame = frame_record(shape, dtype)
    raw = frame.before + data + frame.after(zlib.crc32(data))
    assert len(raw) == frame.num_bytes and len(frame.before) % 64 == 0
    assert_same_bits(torch.load(io.BytesIO(raw), weights_only=True), tensor)
    assert zipfile.ZipFile(io.BytesIO(raw)).testzip() is None
    path = tmp_path / "x.pt"
    path.write_bytes(raw)
    assert_same_bits(torch.load(path, weights_only=True, mmap=True), tensor)
    path.write_bytes(b"something before" + raw + b"after")
    assert_same_bits(read_stored(path, find(path, 16, len(raw)), "x"), tensor)


def test_views_parameters_and_other_values(tmp_path: Path) -> None:
    tensors = {
        "turned": torch.randn(4, 5).T,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "part": torch.randn(10, 10)[2:5],
        "spread": torch.randn(3, 1).expand(3, 4),
        "scalar": torch.tensor(2.5),
    }
    path = tmp_path / "x.pt"
    torch.save({**tensors, "number": 3, "list": [1, "x"], "size": torch.Size([2])}, path)
    found = find(path)
    assert (found["number"], found["list"], found["size"]) == (3, [1, "x"], torch.Size([2]))
    for name, tensor in tensors.items():
        assert_same_bits(read_stored(path, found[name], name), tensor.detach().contiguous(), name)
    rows = read_stored(path, found["turned"], "turned", rows=(1, 3), columns=(2, 4))
    assert_same_bits(rows, tensors["turned"][1:3, 2:4].contiguous())


def test_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "was_run"), "w")

    torch.save({"a": torch.zeros(1), "b": Malicious()}, tmp_path / "x.pt")
    with pytest.raises(ForbiddenGlobal, match="open"):
        find(tmp_path / "x.pt")
    assert not (tmp_path / "was_run").exists()


def rewrite(path: Path, **entries: bytes) -> None:
    """Write the archive again with some of its records replaced, or left out (b"")."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            data = entries.get(name.partition("/")[2].replace(".", "_").replace("/", "_"), data)
            if data:
                archive.writestr(name, data)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"data_pkl": b""}, "no data.pkl"),
        ({"data_0": b""}, "data/0 is missing"),
        ({"data_0": b"123"}, "reaches beyond its storage"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data_pkl": pickle.dumps(1)[:-1] + b"\xff"}, "does not belong to plain data"),
    ],
)
def test_damage_is_named(tmp_path: Path, entries: dict[str, bytes], said: str) -> None:
    torch.save(torch.randn(10), tmp_path / "x.pt")
    rewrite(tmp_path / "x.pt", **entries)
    with pytest.raises((DamagedTorchFile, DamagedPickle), match=said):
        find(tmp_path / "x.pt")


def test_what_is_cut_off_is_no_zip(tmp_path: Path) -> None:
    torch.save(torch.randn(1000), tmp_path / "x.pt")
    with pytest.raises(zipfile.BadZipFile):
        find(tmp_path / "x.pt", 0, 3000)
