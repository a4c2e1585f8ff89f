"""Upload of a published directory to the Hugging Face Hub, or to what HF_ENDPOINT names."""

from __future__ import annotations

import shlex
from pathlib import Path

from meditron_train.errors import MeditronError, UserError


def find_token() -> str | None:
    """HF_TOKEN, or what `hf auth login` has stored."""
    from huggingface_hub import get_token

    return get_token()


def check_repo(name: str) -> None:
    """The name must be one that a repository can have.

    Raises:
        UserError: it is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--repo is {name!r}, which is no name of a repository: {error}") from None


def upload_command(directory: Path, repo: str, *, public: bool) -> str:
    """What to type to upload the directory by hand; a repository that `hf upload` makes is public by default."""
    words = ["hf", "upload", repo, str(directory), *([] if public else ["--private"])]
    return shlex.join(words)


def upload(directory: Path, repo: str, token: str, *, public: bool) -> str:
    """Upload the directory in one commit, so that the repository has all of it or nothing.

    Args:
        public: whether a repository that is made for it is; one that is there stays as it is.

    Returns:
        The commit's address.

    Raises:
        MeditronError: it failed, and with which command to try again.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # Those of the HTTP library below, whichever it is (requests, httpx, httpx2), as huggingface_hub lets them through.
    failures: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        *(kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception),
    )
    api = HfApi(token=token)
    try:
        api.create_repo(repo, repo_type="model", private=not public, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            commit_message=f"Publish {directory.name} with meditron-train",
        )
    except failures as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MeditronError(
            f"{directory} is complete, but its upload to {repo} failed: {first_line}. Try again with: "
            f"{upload_command(directory, repo, public=public)}"
        ) from error
    return str(done.commit_url)
