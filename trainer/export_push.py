"""An exported folder to a model repository of a Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from longspan.errors import ClusterError, UsageError


def check_repository(name: str) -> None:
    """Raises UsageError if `name` can be no repository of a hub, before anything is written."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"--push {name}: {error} Use OWNER/NAME.") from error
    if name.count("/") != 1:
        raise UsageError(f"--push {name}: use OWNER/NAME.")


def push_folder(folder: Path, name: str, *, private: bool, message: str) -> str:
    """Upload an export in one commit; the repository then holds these files and no others.

    The hub is that of HF_ENDPOINT, the token that of HF_TOKEN or of `hf auth login`.

    Args:
        folder: of the export. name: OWNER/NAME of the repository, made if it does not exist.
        private: of a repository that is made. message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        UsageError: the hub refuses (no token, no right to write).
        ClusterError: the hub cannot be reached or fails. The folder stays as it is.
    """
    later = f"The export stays at {folder}; upload it later with `hf upload {name} {folder}`."
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, delete_patterns="*")
    except Exception as error:  # the errors of the library's HTTP client have no name of the library
        answer = _answer(error)
        if answer is None:
            raise ClusterError(
                f"--push {name}: {api.endpoint} could not be reached or failed: {error}. {later}"
            ) from error
        status = answer.response.status_code
        text = f"--push {name}: {api.endpoint} answers {status}: {answer.server_message or answer}. "
        if status in (401, 403):
            raise UsageError(f"{text}Set HF_TOKEN to a token that may write there. {later}") from error
        raise ClusterError(text + later) from error
    return str(commit.commit_url)


def _answer(error: BaseException | None) -> HfHubHTTPError | None:
    """The hub's answer behind an error: the library wraps that of a large file's upload into another error."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error
