from __future__ import annotations

import socket
import sys
import types

import pytest
import torch
import typer

from meditron_train.cli.doctor import doctor as show
from meditron_train.errors import MeditronError
from meditron_train.flows import doctor


def finding(name: str) -> doctor.Finding:
    return next(found for found in doctor.examine() if found.name == name)


def hide_module(monkeypatch, name: str) -> None:
    """Make `import name` fail as if the package were not installed."""
    monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Put empty modules on the path, for one test."""
    planted = []

    def build(*modules: str) -> None:
        for module in modules:
            file = tmp_path.joinpath(*module.split(".")) / "__init__.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
            planted.append(module)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield build
    for module in planted:
        sys.modules.pop(module, None)


def test_a_missing_requirement_stops_training_and_names_the_remedy(monkeypatch, capsys):
    hide_module(monkeypatch, "meditron_train.native._packing")
    core = finding("C++ core")
    assert (core.found, core.in_use, core.blocks_training) == (False, False, True)
    assert "pip install -e ." in core.remedy
    with pytest.raises(typer.Exit) as exit_:
        show(json_output=False)
    assert exit_.value.exit_code == 1
    assert "Training cannot run here: C++ core" in capsys.readouterr().out


@pytest.mark.parametrize("installed", ["0.15.3", "0.18.0"])
def test_an_untested_megatron_core_is_refused(monkeypatch, installed):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: installed if name == "megatron-core" else "1.0")
    for module in [name for name in sys.modules if name.startswith("meditron_train.mcore")]:
        monkeypatch.delitem(sys.modules, module)
    found = finding("megatron-core")
    assert found.blocks_training
    assert installed in found.detail
    assert "megatron-core>=0.16,<0.17" in found.remedy


def test_megatron_core_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_installed_version", lambda name: None)
    found = finding("megatron-core")
    assert (found.found, found.detail, found.blocks_training) == (False, "not installed", True)


def test_what_a_save_needs_is_missing(monkeypatch):
    assert finding("saving checkpoints").in_use
    hide_module(monkeypatch, "psutil")
    saving = finding("saving checkpoints")
    assert saving.blocks_training and saving.detail.startswith("psutil: ")
    assert saving.remedy == "pip install psutil"


def test_the_other_package_named_apex_is_told_from_nvidias(plant):
    assert not finding("apex").found
    plant("apex")
    impostor = finding("apex")
    assert impostor.found
    assert "not NVIDIA's" in impostor.detail
    assert impostor.remedy == "pip uninstall apex"


def test_nvidias_apex(plant):
    plant("apex", "apex.optimizers", "amp_C")
    found = finding("apex")
    assert found.in_use
    assert found.remedy == ""
    assert "NVIDIA's" in found.detail
    plant("transformer_engine", "transformer_engine.pytorch")  # megatron-core asks for it first
    assert not finding("apex").in_use
    assert finding("transformer-engine").in_use


def test_optional_accelerators_never_block(plant):
    missing = finding("transformer-engine")
    assert (missing.found, missing.blocks_training) == (False, False)
    plant("transformer_engine")  # installed, but its pytorch part is not
    broken = finding("transformer-engine")
    assert (broken.found, broken.in_use, broken.blocks_training) == (True, False, False)
    assert "cannot be imported" in broken.detail


def test_attention_table_says_who_attends_and_why_others_do_not(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    used = {name: finding(f"attention: {name}") for name in ("native", "flash_attn", "sdpa")}
    assert [name for name, entry in used.items() if entry.in_use] == ["native"]
    assert used["flash_attn"].detail == "on cpu: runs on CUDA only"
    assert used["sdpa"].found and used["sdpa"].detail == "on cpu: could be used; native comes first"


def test_a_backend_that_breaks_the_gpu_is_a_line_of_the_table(monkeypatch):
    from meditron_train.native import backends

    def why_not(backend, *_):
        if backend.name == "flash_attn":
            raise MeditronError("attention backend 'flash_attn' crashed")
        if backend.name == "native":
            raise torch.OutOfMemoryError("the GPU is full")
        return None if backend.name == "sdpa" else "no"

    monkeypatch.setattr(backends, "why_not", why_not)
    details = {name: finding(f"attention: {name}").detail for name in ("flash_attn", "native", "sdpa")}
    assert details["flash_attn"].endswith("'flash_attn' crashed") and details["sdpa"].endswith("used")
    assert details["native"].endswith("the GPU is full")


def test_instruction_sets_are_named():
    assert "portable" in finding("C++ operators").detail


def test_a_host_name_that_torchrun_would_wait_for(monkeypatch):
    assert finding("host name").in_use
    monkeypatch.setattr(socket, "getfqdn", lambda: "node-not-in-dns.invalid")
    found = finding("host name")
    assert "node-not-in-dns.invalid" in found.detail and "--local-addr 127.0.0.1" in found.remedy
    assert not found.in_use and not found.blocks_training


def test_slurm_and_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not finding("slurm").found
    for name in ("sbatch", "srun", "sinfo"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert finding("slurm").in_use
    (tmp_path / "sinfo").unlink()
    assert "missing: sinfo" in finding("slurm").detail
    monkeypatch.setenv("RANK", "0")
    assert finding("launcher").blocks_training


def test_little_space_is_said_and_does_not_block(monkeypatch, tmp_path):
    usage = types.SimpleNamespace(total=2**40, used=2**40 - 2**20, free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    disk = finding("disk")
    assert (disk.in_use, disk.blocks_training) == (False, False)
    assert "0.0 GiB free" in disk.detail
    assert "logging.run_dir" in disk.remedy


def test_a_broken_binary_is_reported(monkeypatch, tmp_path):
    (tmp_path / "broken_binary.py").write_text("raise OSError('libfoo.so: no such file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert doctor._import("broken_binary") == (None, "OSError: libfoo.so: no such file")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13)), ("2.6a0", (2, 6)), ("2.14.0a0+git1", (2, 14)), ("odd", (0, 0))],
)
def test_versions_of_every_kind_are_compared(version, numbers):
    from meditron_train.flows.doctor import _version_tuple

    assert _version_tuple(version) == numbers
