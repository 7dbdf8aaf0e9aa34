"""
The sections of a verb's --help: what an option is about.
"""

from collections.abc import Mapping

import click

from pho_service.spec.job_fields import SECTIONS

TITLES = (*SECTIONS, "Machine", "Output")

# Options that are not of the document, by the names of their parameters; others are Output.
_OWN = {
    "Text and calibration": ("split", "bundle_path", "text"),
    "What to prune": (
        "config_path", "config_paths", "method", "methods", "presets", "ablation", "seeds",
        "other_family", "from_library", "library", "force", "pattern", "patterns", "scope",
    ),
    "Search": ("study", "search", "trials", "seed"),
    "Confirmation and report": (
        "report_path", "report_text", "report_dataset", "report_dataset_config", "report_data_file",
        "report_split", "report_field", "report_windows", "max_windows", "confirm_text",
    ),
    "The job itself": (
        "job_file", "name", "notify", "priority", "idempotency_key", "wait", "url",
    ),
    "Machine": ("device", "device_map", "card", "device_memory", "main_memory", "stream"),
}  # fmt: skip


class GroupedCommand(click.Command):
    """A verb whose --help has its options in sections."""

    def groups(self) -> Mapping[str, str]:
        """Return the sections of options by the names of their parameters, where they are known."""
        return {name: title for title, names in _OWN.items() for name in names}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options in sections."""
        groups = self.groups()
        for title in TITLES:
            records = [
                parameter.get_help_record(ctx)
                for parameter in self.get_params(ctx)
                if isinstance(parameter, click.Option)
                if groups.get(str(parameter.name), "Output") == title
            ]
            rows = [record for record in records if record is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
