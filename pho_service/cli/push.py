"""`pho push`."""

from pathlib import Path

import click

from pho_service.cli.options import json_option
from pho_service.cli.terminal import print_json, say, verb

public_option = click.option(
    "--public", is_flag=True, help="Everybody can see a new repository; by default only you can."
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository")
@public_option
@json_option
@verb
def push(folder: Path, repository: str, public: bool, as_json: bool) -> None:
    """
    Upload a pruned FOLDER to the Hugging Face hub, as REPOSITORY (org/name).

    The token is that of HF_TOKEN, or of `hf auth login`. A repository that is
    not there is made, private unless --public is given; one that is there stays
    as visible as it is. All files go there; in pruning.json, models and texts of
    this machine are named without their folders.

    \b
    Example:
      pho push pruned my-org/SmolLM2-135M-pruned
    """
    push_folder(folder, repository, public, as_json)


def push_folder(folder: Path, repository: str, public: bool, as_json: bool) -> None:
    """Upload, and say where to."""
    from pho_service.models.hub import push as upload

    address = upload(folder, repository, public=public)
    if as_json:
        print_json({"folder": str(folder), "repository": repository, "commit": address})
        return
    say(f"{folder} is at {address}")
