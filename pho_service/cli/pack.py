"""`pho pack` and `pho unpack`."""

from pathlib import Path

import click

from pho_service.cli.options import json_option
from pho_service.cli.terminal import print_json, progress, verb


@click.command()
@click.argument("folder")
@click.option(
    "--out",
    required=True,
    help="One file if its name ends in .pho; otherwise a new or empty folder, in which the "
    "small files stay as they are.",
)
@json_option
@verb
def pack(folder: str, out: str, as_json: bool) -> None:
    """
    Make a model folder smaller, without losing a bit.

    Zeros take one bit each, and of what is left the exponents are compressed by
    zstd. `pho unpack` restores the folder, and wherever a MODEL is
    asked for, what is packed can be given: it is read one tensor at a time.

    \b
    Example:
      pho pack pruned --out pruned.pho
      pho prune --check pruned.pho
      pho evaluate pruned.pho --text report.txt
    """
    from pho_service.models.packing import pack as pack_folder

    size = pack_folder(Path(folder), Path(out), progress=progress)
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

    Each tensor is compared with its hash; if one is damaged, nothing is written.

    \b
    Example:
      pho unpack pruned.pho --out pruned
    """
    from pho_service.models.packed_file import unpack as unpack_folder

    tensors = unpack_folder(Path(packed), Path(out), progress=progress)
    if as_json:
        print_json({"out": out, "tensors": tensors})
        return
    click.echo(f"{out}: {tensors} tensors, each as its hash says")
