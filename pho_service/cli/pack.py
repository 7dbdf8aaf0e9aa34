"""`pho pack` and `pho unpack`."""

import click

from pho_service.cli.options import json_option
from pho_service.cli.terminal import print_json, verb


@click.command()
@click.argument("folder")
@click.option("--out", required=True, help="A file whose name ends in .pho.")
@json_option
@verb
def pack(folder: str, out: str, as_json: bool) -> None:
    """
    Make a model folder smaller, without losing a bit.

    Each file is compressed by zstandard. `pho unpack` restores the folder, and
    wherever a MODEL is asked for, what is packed can be given: it is unpacked
    into the cache for as long as it is needed.

    \b
    Example:
      pho pack pruned --out pruned.pho
      pho prune --check pruned.pho
      pho evaluate pruned.pho --text report.txt
    """
    from pho_service.models.packed import pack as pack_folder

    size = pack_folder(folder, out, progress=True)
    if as_json:
        print_json(
            {"out": out, "bytes": size.after, "unpacked_bytes": size.before, "ratio": size.ratio}
        )
        return
    click.echo(f"{out}: {size.after:,} bytes, {size.ratio:.3f} of the {size.before:,} of {folder}")


@click.command()
@click.argument("packed")
@click.option("--out", required=True, help="A new or empty folder.")
@json_option
@verb
def unpack(packed: str, out: str, as_json: bool) -> None:
    """
    Restore the folder that `pho pack` has packed, bit for bit.

    Each file is compared with its checksum; if one is damaged, nothing is written.

    \b
    Example:
      pho unpack pruned.pho --out pruned
    """
    from pho_service.models.packed import unpack as unpack_file

    files = unpack_file(packed, out, progress=True)
    if as_json:
        print_json({"out": out, "files": files})
        return
    click.echo(f"{out}: {files} files, each as its checksum says")
