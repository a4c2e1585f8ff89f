"""Publication: what lies in the directory, that it is the trained model, and that it appears whole or not at all."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from meditron_train.checkpoint.convert.merge import merge_checkpoints
from meditron_train.checkpoint.manifest import verify_manifest
from meditron_train.errors import MeditronError
from meditron_train.files import sha256_file
from meditron_train.flows.publish import publish as flow
from meditron_train.flows.publish.publish import Wishes, publish
from meditron_train.verify.verify import verify
from tests.checkpoint.tiny_llama import read_tensors, rewrite_tensors
from tests.flows.publish.hub import serve
from tests.long import mostly_long
from tests.refusal import refused

EVALUATION = {
    "model": "",
    "protocol": {"mode": "likelihood", "shots": 0, "seeds": [1234]},
    "scores": [
        {
            "benchmark": "medqa5", "title": "MedQA", "accuracy": 0.5, "interval": [0.4, 0.6], "num_items": 100,
            "num_unparsed": 0, "num_ties": 0, "spread": 0.0, "accuracy_of_parsed": 0.5, "chance": 0.2,
            "file_sha256": "ab" * 32, "protocol": {"mode": "likelihood", "shots": 0, "seeds": [1234]},
        }
    ],
    "answers": {},
}  # fmt: skip


def read_card(directory: Path) -> tuple[dict[str, Any], str]:
    """(front matter, text)"""
    _, header, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_a_run_becomes_a_directory_that_may_be_passed_on(run_dir: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "scores.json"
    evaluation.write_text(json.dumps({**EVALUATION, "model": str(run_dir)}))
    done = publish(run_dir, tmp_path / "Tiny-Med", Wishes(base_model="lab/base", evaluations=(evaluation,)))
    out, checkpoint = tmp_path / "Tiny-Med", run_dir / "checkpoints" / "step_00000006"
    assert {path.name for path in tmp_path.iterdir()} == {"Tiny-Med", "scores.json"}
    assert verify_manifest(out) == [] and verify(checkpoint, out).differences == ()
    assert done.check.is_loaded and done.check.num_tensors == len(read_tensors(out))
    assert done.check.max_difference == 0 and done.to_do == () and done.url is None
    for name in ("generation_config.json", "tokenizer.model", "tokenizer.json", "USE_POLICY.md"):
        assert (out / name).is_file()
    assert (out / "LICENSE").read_text() == "LLAMA 2 COMMUNITY LICENSE AGREEMENT, all of it\n"
    assert "Apache License" in (out / "LICENSE-CODE").read_text()
    assert (
        "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
        "Reserved." in (out / "NOTICE").read_text()
    )
    header, text = read_card(out)
    assert (header["license"], header["base_model"]) == ("llama2", "lab/base")
    (result,) = header["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.5 and header["model-index"][0]["name"] == "Tiny-Med"
    assert "| Tiny-Med | likelihood, 0 shots |" in text and "50.0 [40.0, 60.0]" in text
    assert "after continued pretraining on 1,536 tokens" in text  # 6 x 4 x 64
    assert "| steps | 6 of 6 |" in text and "tensor 2 x pipeline 1 x context 1 x data 1" in text
    assert "| learning rate | 0.003, cosine to 0.0001, 2 steps of warm-up |" in text
    assert "| one | 75.0% |" in text and "last loss, validation, held-out" in text
    assert "not a medical device" in text and "| hardware | 2 x cpu |" in text and "x 100 W" in text
    assert sha256_file(checkpoint / "manifest.json") in text
    for path in out.iterdir():  # nothing of this machine
        if path.suffix in (".md", ".json") or path.name == "NOTICE":
            content = path.read_text()
            assert not [
                word for word in (str(run_dir.parent), str(tmp_path), socket.gethostname()) if word in content
            ]
            assert getpass.getuser() == "root" or getpass.getuser() not in content


def test_transformers_computes_the_checkpoints_logits(run_dir: Path, tmp_path: Path) -> None:
    """Against the export that training itself has made, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    publish(run_dir / "checkpoints" / "step_00000006", tmp_path / "out", Wishes())
    models = [
        AutoModelForCausalLM.from_pretrained(d, dtype="float32") for d in (tmp_path / "out", run_dir / "hf")
    ]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(
        "the dose of mevatrin", return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        a, b = (model(ids).logits for model in models)
    assert torch.equal(a, b) and a.std() > 0.01


def test_without_a_stated_license_nothing_is_written(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir / "hf", tmp_path / "model")
    with refused("the license of the base model is not stated", "--base-license", "model.license"):
        publish(tmp_path / "model", tmp_path / "out", Wishes())
    with refused("is not a model"):
        publish(tmp_path, tmp_path / "out", Wishes("llama2"))
    with refused("exists and is not empty"):
        publish(run_dir, tmp_path / "model", Wishes())
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_another_model_than_the_checkpoints_is_never_published(
    run_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    export = flow.export_hf

    def spoilt(checkpoint: Path, directory: Path, **options: Any) -> None:
        export(checkpoint, directory, **options)
        tensors = read_tensors(directory)
        tensors["model.norm.weight"][0] += 1e-3
        rewrite_tensors(directory, tensors)

    monkeypatch.setattr(flow, "export_hf", spoilt)
    with refused("is not the model of", "model.norm.weight", kind=MeditronError):
        publish(run_dir, tmp_path / "out", Wishes())
    assert list(tmp_path.iterdir()) == []


def test_what_an_interruption_leaves_is_taken_over(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(flow, "check_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            publish(run_dir, tmp_path / "out", Wishes())
    assert [path.name for path in tmp_path.iterdir()] == ["out.publishing"]
    publish(run_dir, tmp_path / "out", Wishes())
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and verify_manifest(tmp_path / "out") == []
    (tmp_path / "other.publishing").mkdir()
    (tmp_path / "other.publishing" / "thesis.txt").touch()
    with refused("other.publishing is in the way"):
        publish(run_dir, tmp_path / "other", Wishes())
    assert (tmp_path / "other.publishing" / "thesis.txt").exists()


@pytest.mark.long
def test_a_merged_model_names_its_parents(run_dir: Path, tmp_path: Path) -> None:
    steps = [run_dir / "checkpoints" / f"step_{step:08d}" for step in (3, 6)]
    merge_checkpoints(steps, tmp_path / "merged", weights="0.25,0.75")
    done = publish(tmp_path / "merged", tmp_path / "out", Wishes("llama2", dtype="bf16"))
    assert verify(tmp_path / "merged", tmp_path / "out").cast == "bfloat16"
    assert len(done.to_do) == 1 and "no copy was found beside the base" in done.to_do[0]
    header, text = read_card(tmp_path / "out")
    assert "merge" in header["tags"] and "The record of the training run was not at hand" in text
    for weight, step in (("0.25", steps[0]), ("0.75", steps[1])):
        line = f"| {weight} | {step.name} | {int(step.name[5:])} | `{sha256_file(step / 'manifest.json')}` |"
        assert line in text


@pytest.mark.long
def test_the_export_of_a_run_is_compared_with_its_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    assert flow.find_origin(run_dir / "hf").training == run_dir.resolve() / "checkpoints" / "step_00000006"
    publish(run_dir / "hf", tmp_path / "out", Wishes())
    assert "| steps | 6 of 6 |" in read_card(tmp_path / "out")[1]


def test_an_evaluation_of_another_model_is_pointed_out(run_dir: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "scores.json"
    evaluation.write_text(json.dumps({**EVALUATION, "model": "/models/another"}))
    done = publish(run_dir, tmp_path / "out", Wishes(evaluations=(evaluation,)))
    assert "is an evaluation of /models/another" in done.to_do[0]
    evaluation.write_text("{}")
    with refused("scores.json is not a result of `evaluate --output`"):
        publish(run_dir, tmp_path / "other", Wishes(evaluations=(evaluation,)))


@pytest.mark.parametrize("place", mostly_long(["/elsewhere", "/elsewhere/hf", "unknown"], "/elsewhere"))
def test_an_evaluation_belongs_to_its_checkpoint_by_its_hash(
    run_dir: Path, tmp_path: Path, place: str
) -> None:
    """Wherever it lies, and not to another one of the same run."""
    steps = [run_dir / "checkpoints" / f"step_{step:08d}" for step in (3, 6)]
    earlier, last = (sha256_file(step / "manifest.json") for step in steps)
    evaluation, out = tmp_path / "scores.json", tmp_path / "out"
    wishes = Wishes(evaluations=(evaluation,))

    def write(model: str, **said: str | None) -> None:
        checkpoint = {"name": "step", **said}
        evaluation.write_text(json.dumps({**EVALUATION, "model": model, "checkpoint": checkpoint}))

    write(str(run_dir), manifest_sha256=earlier)
    with refused("scores.json is of another checkpoint (step of", "evaluate this one"):
        publish(run_dir, out, wishes)
    assert not list(tmp_path.glob(f"{out.name}*"))
    if place == "/elsewhere":
        write(place, manifest_sha256=last)
    elif place == "/elsewhere/hf":
        write(place, manifest_sha256="ab", source_manifest_sha256=last)
    else:
        write(str(run_dir), manifest_sha256=None)
    assert publish(run_dir, out, wishes).to_do == ()


@pytest.mark.long
def test_a_part_of_the_questions_is_no_entry_of_the_hubs_table(run_dir: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "scores.json"
    evaluation.write_text(json.dumps({**EVALUATION, "model": str(run_dir), "limit": 100}))
    publish(run_dir, tmp_path / "Tiny", Wishes(evaluations=(evaluation,)))
    header, text = read_card(tmp_path / "Tiny")
    assert "model-index" not in header
    assert "50.0 [40.0, 60.0] n=100" in text and "Tiny: only the first 100 questions of each" in text


def test_an_upload_without_the_licenses_text_is_refused(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(flow, "find_token", lambda: "hf_secret")
    monkeypatch.setattr(flow, "upload", lambda *_, **__: pytest.fail("it was uploaded"))
    model = shutil.copytree(run_dir / "hf", tmp_path / "model")
    with refused("no copy was found beside the base: before an upload, give it with --license-file FILE"):
        publish(model, tmp_path / "out", Wishes("llama2", repo="lab/tiny"))
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_signed_and_every_change_is_seen(run_dir: Path, tmp_path: Path, key: Path) -> None:
    from model_signing import verifying

    from meditron_train.flows.publish.signing import fingerprint, public_pem, read_key

    done = publish(run_dir, tmp_path / "out", Wishes(sign=key))
    public = tmp_path / "public.pem"
    public.write_bytes(public_pem(read_key(key)))
    assert done.is_signed and fingerprint(read_key(key)) in read_card(tmp_path / "out")[1]
    assert verify_manifest(tmp_path / "out") == []
    moved = (tmp_path / "out").rename(tmp_path / "downloaded")
    config = verifying.Config().use_elliptic_key_verifier(public_key=public)
    config.verify(moved, moved / "model.sig")
    for name in ("README.md", "manifest.json", "model.safetensors"):
        kept = (moved / name).read_bytes()
        (moved / name).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ValueError):
            config.verify(moved, moved / "model.sig")
        (moved / name).write_bytes(kept)
    (moved / "added.py").touch()
    with pytest.raises(ValueError):
        config.verify(moved, moved / "model.sig")


def test_keys_that_cannot_sign(run_dir: Path, tmp_path: Path, key: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    encrypted = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    other = rsa.generate_private_key(65537, 2048).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    for content, message in (
        (b"no key", "is not a private key in PEM"),
        (encrypted, "has a password"),
        (other, "is not an ECDSA key"),
    ):
        key.write_bytes(content)
        with refused(message):
            publish(run_dir, tmp_path / "out", Wishes(sign=key))
    with refused("cannot be read"):
        publish(run_dir, tmp_path / "out", Wishes(sign=tmp_path / "absent.pem"))
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_upload_to_a_hub(run_dir: Path, tmp_path: Path) -> None:
    """The command against a stand-in: all files in one commit, a private repository; then a hub that fails."""
    with serve() as hub:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1",  # the stand-in has the plain protocol
        }  # fmt: skip
        command = [sys.executable, "-m", "meditron_train", "publish", str(run_dir), str(tmp_path / "out")]
        done = subprocess.run(
            [*command, "--repo", "lab/tiny"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert f"Uploaded: {hub.url}/lab/tiny/commit/" in done.stderr
        assert hub.repos == {"lab/tiny": True} and len(hub.commits) == 1 and hub.tokens == {"hf_secret"}
        assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert 'from_pretrained("lab/tiny")' in hub.files["README.md"].decode()


def test_without_a_token_the_upload_is_to_be_done(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(flow, "find_token", lambda: None)
    done = publish(run_dir, tmp_path / "out", Wishes(repo="lab/tiny"))
    assert done.url is None and f"hf upload lab/tiny {tmp_path}/out --private" in done.to_do[-1]


def test_a_name_that_no_repository_can_have_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with refused("which is no name of a repository"):
        publish(run_dir, tmp_path / "out", Wishes(repo="a/b/c"))


@pytest.mark.long
def test_what_a_failing_hub_leaves_is_complete(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise MeditronError("500")

    monkeypatch.setattr(flow, "find_token", lambda: "hf_secret")
    monkeypatch.setattr(flow, "upload", fail)
    with refused("500", kind=MeditronError):
        publish(run_dir, tmp_path / "out", Wishes(repo="lab/tiny"))
    assert verify_manifest(tmp_path / "out") == []
