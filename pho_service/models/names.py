"""
What the name of a model stands for: something on this machine, or on the Hugging Face hub.

Nothing heavy is imported: a name that is wrong is refused before torch is there.
"""

import re
from pathlib import Path

from pho_service.errors import InvalidInput, ModelError
from pho_service.host.access import is_path
from pho_service.models.hub_or_cache import hub_is_away

# Why a model of the hub cannot be had, in the sentence that begins with its name.
AWAY = (
    "no folder or file here has this name, and as a name on the hub it cannot be looked up: the "
    "hub cannot be reached, and no copy is in the local cache. Check the spelling, the network "
    "and HF_ENDPOINT, or give a local folder or a .gguf file."
)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_on_hub(name: str, revision: str | None) -> bool:
    """
    Return whether a name is one of the hub: nothing here has it, and it does not look like a path.

    What would lie in a folder that is there is missing: somebody else may have its name on the
    hub, which a revision asks for.
    """
    if Path(name).expanduser().exists() or is_path(name):
        return False
    folder = name.rpartition("/")[0]
    return folder == "" or revision is not None or not Path(folder).is_dir()


def check_name(name: str, revision: str | None) -> None:
    """
    See that a model can be there, before anything long: the hub is asked once whether it answers.

    Raises:
        InvalidInput: A revision of what is local.
        ModelError: A path that does not exist, or a name that cannot be one of the hub; or the
            hub is away, and the model is not in its cache.
    """
    if not is_on_hub(name, revision):
        check_local_name(name, revision)
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        kept = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise ModelError(
            f"{name!r} is neither a folder or file here nor a name on the hub, which looks like "
            "org/name. Check the spelling."
        ) from error
    if not isinstance(kept, str) and hub_is_away():
        raise ModelError(f"{name} cannot be loaded: {AWAY}")


def check_local_name(name: str, revision: str | None) -> None:
    """
    See that what is on this machine is there.

    Raises:
        InvalidInput: A revision is given.
        ModelError: It does not exist.
    """
    path = Path(name).expanduser()
    if revision:
        raise InvalidInput(f"--revision {revision} is for hub ids, but {name} is a local path.")
    if path.exists():
        return
    beside = path.parent != Path() and path.parent.is_dir()
    though = f", though the folder {path.parent} does" if beside else ""
    hint = f" For the hub's {name} give --revision main." if _HUB_ID.fullmatch(name) else ""
    raise ModelError(
        f"{name} does not exist{though}. Give a hub id, a model folder or a .gguf file.{hint}"
    )
