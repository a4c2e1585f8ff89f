"""From a checkpoint to a directory that may be passed on: complete, checked, signed, and only then under its name.

All of it is made in `OUT_DIR.publishing`; one rename gives it the name. After a kill, the same command goes on with the
export where it stopped.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meditron_train.checkpoint.convert.engine import NO_LIMITS, Limits, Progress
from meditron_train.checkpoint.convert.to_hf import export_hf, rewrite_hf
from meditron_train.checkpoint.convert.workspace import require_absent
from meditron_train.checkpoint.files.stored import ReadError
from meditron_train.checkpoint.hf.config import read_hf_config
from meditron_train.checkpoint.hf.read import is_hf_directory
from meditron_train.checkpoint.manifest import MANIFEST_NAME, read_manifest, write_manifest
from meditron_train.errors import UserError
from meditron_train.evaluate.harness.compare import read_result
from meditron_train.files import has_no_locks, overlap, sha256_file, sync_directory
from meditron_train.flows.publish.card import Card, model_card
from meditron_train.flows.publish.check import Check, check_model
from meditron_train.flows.publish.facts import RunFacts, collect_facts
from meditron_train.flows.publish.licenses import LicenseFiles, find_license
from meditron_train.flows.publish.origin import Origin, find_origin
from meditron_train.flows.publish.signing import fingerprint, read_key, require_library, sign
from meditron_train.flows.publish.upload import check_repo, find_token, upload, upload_command
from meditron_train.log import get_logger
from meditron_train.planner.cost import DEFAULT_CARBON_KG_PER_KWH, DEFAULT_PUE
from meditron_train.tokenizer.files import has_tokenizer
from meditron_train.tokenizer.reading import open_tokenizer

_log = get_logger(__name__)

_MARK = ".publication"  # in OUT_DIR.publishing: what makes it ours to clear, and its lock


@dataclass(frozen=True)
class Wishes:
    """What the user wants.

    Attributes:
        base_license: as the Hub spells it.
        license_file: its words.
        base_model: id of the base on the Hub.
        evaluations: results of `evaluate --output`.
        repo: where to upload to.
        public: whether a repository that is made for it is.
        sign: private key in PEM.
        gpu: name in planner.hardware, where the run does not tell.
    """

    base_license: str | None = None
    license_file: Path | None = None
    base_model: str | None = None
    evaluations: tuple[Path, ...] = ()
    repo: str | None = None
    public: bool = False
    sign: Path | None = None
    gpu: str | None = None
    dtype: str | None = None
    max_shard_size: str = "5GB"
    pue: float = DEFAULT_PUE
    carbon_kg_per_kwh: float = DEFAULT_CARBON_KG_PER_KWH


@dataclass(frozen=True)
class Published:
    """What came of it.

    Attributes:
        url: of the upload, None without one.
        to_do: what remains for the user, one sentence each.
    """

    directory: Path
    check: Check
    is_signed: bool
    url: str | None
    to_do: tuple[str, ...]


def publish(
    checkpoint: Path,
    directory: Path,
    wishes: Wishes,
    *,
    limits: Limits = NO_LIMITS,
    progress: Progress | None = None,
) -> Published:
    """Write `directory` from a run, a sharded checkpoint or a Hugging Face directory, and upload it where that is asked
    for and a token is there.

    Raises:
        UserError: the base's license is not stated, the checkpoint is none, or a file given is not what it should be;
            nothing is written then.
        MeditronError: the result is not the model of the checkpoint, and nothing has the name `directory`; or only the
            upload failed.
    """
    origin, directory = find_origin(checkpoint), Path(os.path.realpath(directory))
    require_absent(directory, origin.weights, origin.run_dir and _inside(directory, origin.run_dir))
    name = (wishes.repo or directory.name).rpartition("/")[2]
    if wishes.repo is not None:
        check_repo(wishes.repo)
    facts = collect_facts(origin, wishes.gpu)
    evaluations = [read_result(path) for path in wishes.evaluations]
    base = facts.config.model.from_ if facts is not None else None
    stated = wishes.base_license or (facts.config.model.license if facts is not None else None)
    license_files, to_do = find_license(
        stated, wishes.license_file, base, name, is_uploaded=wishes.repo is not None
    )
    key = None
    if wishes.sign is not None:
        require_library()
        key = read_key(wishes.sign)
    for path, result in zip(wishes.evaluations, evaluations, strict=True):
        to_do += _evaluation_notes(path, result, origin, checkpoint)
    with _staging(directory) as staging:
        staged = staging / directory.name
        _export(origin, staged, wishes, limits, progress)
        check = check_model(origin.reference, staged, wishes.dtype)
        base_name = wishes.base_model or (base.name if base is not None else "the base model")
        card = _card(staged, name, base_name, wishes, origin, facts, evaluations, check, license_files, key)
        license_files.write(staged, name, base_name)
        (staged / "README.md").write_text(model_card(card), encoding="utf-8")
        _seal(staged)
        if wishes.sign is not None:
            sign(staged, wishes.sign, key)
            sync_directory(staged)
        staged.rename(directory)
        sync_directory(directory.parent)
    url = None
    if wishes.repo is not None:
        if (token := find_token()) is not None:
            url = upload(directory, wishes.repo, token, public=wishes.public)
        else:
            to_do.append(
                "nothing was uploaded, as there is no token (HF_TOKEN, or hf auth login): "
                f"{upload_command(directory, wishes.repo, public=wishes.public)}"
            )
    return Published(directory, check, key is not None, url, tuple(to_do))


def _inside(directory: Path, run_dir: Path) -> Path | None:
    """The run's checkpoints, where the output would lie among them; elsewhere in the run it harms nothing."""
    checkpoints = run_dir / "checkpoints"
    return checkpoints if overlap(directory, checkpoints) else None


def _evaluation_notes(path: Path, result: dict[str, Any], origin: Origin, checkpoint: Path) -> list[str]:
    """Where a result without a hash of its checkpoint is not evidently of what is published, by its path.

    Raises:
        UserError: by the hash, it is of another checkpoint.
    """
    known = _manifest_hashes(origin)
    evaluated_hashes = _evaluated_hashes(result)
    if evaluated_hashes and known:
        if evaluated_hashes & known:
            return []
        name = result["checkpoint"].get("name")
        raise UserError(
            f"--evaluation {path} is of another checkpoint ({name} of {result['model']}, by the hash of its manifest) "
            f"than the one published, {origin.weights}: evaluate this one, or leave it out"
        )
    places = {
        place.resolve() for place in (checkpoint, origin.weights, origin.training, origin.run_dir) if place
    }
    evaluated = Path(str(result["model"])).resolve()
    if evaluated in places or (origin.run_dir and evaluated == (origin.run_dir / "hf").resolve()):
        return []
    return [
        f"{path} is an evaluation of {result['model']}: make sure that it is this model, as the card says so"
    ]


def _manifest_hashes(origin: Origin) -> set[str]:
    """Of what is published, and of what it comes from."""
    directories = (origin.weights, origin.training)
    manifests = [directory / MANIFEST_NAME for directory in directories if directory is not None]
    hashes = {sha256_file(manifest) for manifest in manifests if manifest.is_file()}
    return hashes | {said for said in (origin.source.get("manifest_sha256"),) if isinstance(said, str)}


def _evaluated_hashes(result: dict[str, Any]) -> set[str]:
    checkpoint = result.get("checkpoint")
    if not isinstance(checkpoint, dict):  # of an earlier version
        return set()
    said = (checkpoint.get("manifest_sha256"), checkpoint.get("source_manifest_sha256"))
    return {digest for digest in said if isinstance(digest, str)}


def _export(origin: Origin, staged: Path, wishes: Wishes, limits: Limits, progress: Progress | None) -> None:
    if staged.exists():  # complete, or with some of what lies beside the weights: of a former attempt
        shutil.rmtree(staged)
    write = rewrite_hf if is_hf_directory(origin.weights) else export_hf
    write(
        origin.weights,
        staged,
        dtype=wishes.dtype,
        max_shard_size=wishes.max_shard_size,
        limits=limits,
        progress=progress,
    )


def _card(
    staged: Path,
    name: str,
    base: str,
    wishes: Wishes,
    origin: Origin,
    facts: RunFacts | None,
    evaluations: list[dict[str, Any]],
    check: Check,
    license_files: LicenseFiles,
    key: Any,
) -> Card:
    return Card(
        name=name,
        model=read_hf_config(staged),
        license=license_files.license,
        license_is_known=license_files.is_known,
        base=base,
        base_model=wishes.base_model,
        repo=wishes.repo,
        facts=facts,
        merge=origin.source if origin.source.get("format") == "merge" else None,
        evaluations=evaluations,
        check=check,
        public_key_sha256=None if key is None else fingerprint(key),
        has_chat_template=_has_chat_template(staged),
        pue=wishes.pue,
        carbon_kg_per_kwh=wishes.carbon_kg_per_kwh,
    )


def _has_chat_template(directory: Path) -> bool:
    if not has_tokenizer(directory):
        return False
    return bool(open_tokenizer(directory).chat_template)


def _seal(staged: Path) -> None:
    """The manifest again, with the files that have come to those of the export."""
    manifest = read_manifest(staged) or {}
    known = manifest.pop("files")
    extra = {key: value for key, value in manifest.items() if key not in ("format", "hash")}
    (staged / MANIFEST_NAME).unlink()
    write_manifest(staged, known=known, extra=extra)
    sync_directory(staged)


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """`DIRECTORY.publishing`, this process's alone until the block ends. An error removes it, so that a full disk is
    not left full; an interruption, or a source that cannot be read just now, leaves it for the next attempt."""
    staging = directory.with_name(directory.name + ".publishing")
    mark = staging / _MARK
    if staging.is_symlink() or (staging.exists() and not mark.is_file() and any(staging.iterdir())):
        raise UserError(f"{staging} is in the way, and is not an interrupted publication. Move it away")
    staging.mkdir(parents=True, exist_ok=True)
    with mark.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{staging} is being written by another process. Wait for it") from None
        except OSError as error:
            if not has_no_locks(error):
                raise
        try:
            yield staging
        except ReadError:
            raise
        except Exception:
            _remove(staging)
            raise
        _remove(staging)


def _remove(staging: Path) -> None:
    """The mark goes last: without it, nobody may clear the rest."""
    with suppress(OSError):
        for path in staging.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        (staging / _MARK).unlink()
        staging.rmdir()
