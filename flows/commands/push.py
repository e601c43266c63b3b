"""`staple export --push NAME`: what was exported, as a private repository of a Hugging Face hub.

The token comes from the environment, and goes into the requests' headers alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from constitutions.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN = "HF_TOKEN"
Answer = TypeVar("Answer")


def check_push(name: str) -> None:
    """Check the name, the token and the hub before anything is exported.

    Raises:
        UserError: the name is none of a repository, there is no token, or the hub refuses it.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            "no repository can have this name",
            where=f"--push {name}",
            expected="OWNER/NAME: letters, digits, dot, dash and underscore, as in ann/helper-3",
        ) from None
    _asked(name, _hub(name).whoami)


def push(path: Path, name: str) -> str:
    """Upload an exported directory as a model, or an exported file into a data set; its address.

    A new repository is private; in one that exists, files of the same names are replaced.

    Raises:
        UserError: the hub cannot be reached, or refuses it.
    """
    hub, kind = _hub(name), "model" if path.is_dir() else "dataset"

    def upload() -> str:
        hub.create_repo(name, repo_type=kind, private=True, exist_ok=True)
        to: dict[str, Any] = {"repo_id": name, "repo_type": kind}
        to["commit_message"] = f"staple export: {path.name}"
        if path.is_dir():
            hub.upload_folder(folder_path=path, **to)
        else:
            hub.upload_file(path_or_fileobj=path, path_in_repo=path.name, **to)
        return f"{hub.endpoint}/{'' if kind == 'model' else 'datasets/'}{name}"

    return _asked(name, upload)


def _hub(name: str) -> HfApi:
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    token = os.environ.get(TOKEN, "")
    if not token:
        raise UserError(
            f"the variable {TOKEN} is not set",
            where=f"--push {name}",
            expected="a token of the hub that may write",
            fix=f"export {TOKEN}=…, and run the command again",
        )
    disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)


def _asked(name: str, ask: Callable[[], Answer]) -> Answer:
    """What the hub answers; an error of it says no more than its status and message."""
    from httpx2 import HTTPError  # of huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return ask()
    except HfHubHTTPError as error:
        status, said = error.response.status_code, error.server_message or str(error)
    except (HTTPError, OSError, RuntimeError) as error:  # offline; an upload that broke off
        status, said = 0, str(error) or type(error).__name__
    lines = said.replace(os.environ.get(TOKEN) or "\0", "…").splitlines()
    raise UserError(
        f"the hub refused it ({status}): {lines[0]}" if status else f"no hub answers: {lines[0]}",
        where=f"--push {name}",
        expected="a hub that can be reached, and a token that may write there",
        fix=f"check {TOKEN}, and HF_ENDPOINT if the hub is your own",
    )
