"""
A pruned folder on the Hugging Face hub.
"""

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from pho_service.errors import InvalidInput, ServiceError
from pho_service.models.recipe_file import read_recipe
from pho_service.models.saving import RECIPE
from pho_service.models.shared_recipe import shareable

# Of the HTTP library that huggingface_hub takes: httpx, or in newer versions httpx2.
_HTTPError: type[BaseException] = HfHubHTTPError.__bases__[0]


def _files(folder: Path) -> list[Path]:
    """The files of a folder, without those of tools, which are hidden."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [p for p in files if not any(x.startswith(".") for x in p.relative_to(folder).parts)]


def _added(folder: Path, path: Path) -> CommitOperationAdd:
    """A file as it is uploaded."""
    name = path.relative_to(folder).as_posix()
    if name != RECIPE:
        return CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
    recipe = shareable(json.loads(path.read_bytes()))
    text = json.dumps(recipe, indent=2) + "\n"
    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode())


def push(folder: str | Path, repository: str, *, public: bool = False) -> str:
    """
    Upload a pruned folder, as one commit.

    ``pruning.json`` then only has the names of models, texts and libraries on this machine, not
    their folders; the file in the folder stays as it is.

    The token is that of ``HF_TOKEN``, or of `hf auth login`.

    Args:
        folder: What `pho prune` wrote.
        repository: ``org/name``; made if it is not there. One that is there stays private or
            public, as it is.
        public: Whether a new one can be seen by everybody.

    Returns:
        The commit's address.

    Raises:
        ModelError, ConfigurationError: The folder is not one that `pho prune` wrote.
        InvalidInput: ``repository`` is not a name of the hub.
        ServiceError: The hub says no, or cannot be reached.
    """
    folder = Path(folder).expanduser()
    recipe = read_recipe(folder)
    if repository.count("/") != 1:
        raise InvalidInput(
            f"{repository!r} is not a repository of the hub. Write org/name, or user/name."
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.create_commit(
            repo_id=repository,
            operations=[_added(folder, path) for path in _files(folder)],
            commit_message=f"Pruned to {recipe.configuration.pattern} with PHO",
        )
    except HFValidationError as error:
        raise InvalidInput(f"{repository!r} is not a name of the hub: {error}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        way_out = (
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there."
            if status in (401, 403)
            else "Nothing of the folder was lost; push it again."
        )
        raise ServiceError(
            f"the hub refuses {repository}: {error.server_message or error}. {way_out}",
            status=status,
        ) from error
    except (OSError, _HTTPError) as error:
        raise ServiceError(
            f"the hub at {api.endpoint} cannot be reached: {error}. Push again: "
            f"`pho push {folder} {repository}`."
        ) from error
    return str(commit.commit_url)
