"""
`--plot`: charts of a report as a page of their own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pho_service.cli.options import out_file
from pho_service.errors import InvalidInput

if TYPE_CHECKING:
    from pho_service.pipeline.validate import Validation


def plot_file(name: str) -> Path:
    """
    The file that a plot will be written to, checked before any long work.

    Raises:
        InvalidInput: Its name does not end in ``.html``.
        OutputError: It cannot be written.
    """
    if Path(name).suffix.lower() not in (".html", ".htm"):
        raise InvalidInput(
            f"--plot {name} is not a name of a page: plots are drawn in HTML, which a browser "
            f"shows and saves as a picture. Give {Path(name).with_suffix('.html')}."
        )
    return out_file(name)


def plot_validation(result: "Validation", path: Path, title: str) -> None:
    """Write a page with a chart for each proxy: its value against perplexity."""
    from pho_service.shown.charts import validation_charts
    from pho_service.shown.parts import Section, page

    drawn = validation_charts(result.proxies, result.perplexity, result.qualities)
    count = f"{len(result.candidates)} random candidates, rated by each proxy and by perplexity."
    section = Section(id="proxies", title="Proxies against perplexity", texts=[count], charts=drawn)
    _write(path, page(title, [section]))


def plot_transfer(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Write a page with what a configuration was worth on each model, as a report shows it."""
    from pho_service.shown.page import transfer_section
    from pho_service.shown.parts import page

    if all("error" in record for record in records):
        raise InvalidInput("there is nothing to plot: no model could be measured.")
    _write(path, page(title, [transfer_section(records)]))


def plot_curve(document: dict[str, Any], path: Path) -> None:
    """Write a page with perplexity against sparsity, and the table of the points."""
    from pho_service.shown.page import curve_page

    _write(path, curve_page(document))


def _write(path: Path, text: str) -> None:
    from pho_service.host.files import new_file

    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
