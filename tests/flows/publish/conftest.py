"""A short run whose model is published."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from tests.distributed import run_ranks
from tests.train.conftest import corpus, hf_dir  # noqa: F401
from tests.train.test_loop import run_rank


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, hf_dir: Path, corpus: Path) -> Path:  # noqa: F811
    """Six steps on two ranks, exported; the base has a license and a policy beside it."""
    root = tmp_path_factory.mktemp("published")
    base = shutil.copytree(hf_dir, root / "Llama-2-tiny")
    (base / "LICENSE.txt").write_text("LLAMA 2 COMMUNITY LICENSE AGREEMENT, all of it\n")
    (base / "USE_POLICY.md").write_text("# Acceptable use\n")
    config = {
        "model": {"from": str(base), "license": "llama2"},
        "data": {
            "tokenizer": str(base),
            "train": [
                {"name": "one", "path": str(corpus / "one"), "weight": 3.0},
                {"name": "two", "path": str(corpus / "two"), "weight": 1.0},
            ],
            "validation": [{"name": "held-out", "path": str(corpus / "validation")}],
        },
        "optimizer": {"lr": 3.0e-3, "min_lr": 1.0e-4},
        "schedule": {"warmup_steps": 2},
        "parallel": {"tensor": 2},
        "train": {"steps": 6, "seq_len": 64, "global_batch_size": 4, "precision": "fp32", "device": "cpu"},
        "checkpoint": {"interval": 3},
        "validation": {"interval": 6, "steps": 2},
        "logging": {"run_dir": str(root / "run"), "tensorboard": False},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    assert run_ranks(run_rank, 2, root / "config.yaml", ()) == [0, 0]
    return root / "run"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """An ECDSA key in PEM; skips where model-signing is not installed."""
    pytest.importorskip("model_signing", reason="the extra `publish` is not installed")
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = tmp_path / "key.pem"
    private = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path
