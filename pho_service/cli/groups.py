"""
The sections of a verb's --help: what an option is about.
"""

from collections.abc import Mapping

import click

# Fields of a job's document by section, each with all that is below it unless that is named itself.
GROUPS = {
    "Model": ("model", "more_models", "revision", "dtype"),
    "Text": ("calibration", "confirm", "tasks", "tasks_dir", "tasks_limit"),
    "Method": ("pattern", "patterns", "target", "scope", "preset", "steps", "search_space"),
    "Search": (
        "objective", "validation", "warm_start", "sampler", "trials", "corrections", "islands",
        "seed", "timeout_s", "max_failed_trials",
    ),
    "Machine": ("stream", "calibration/memory_bytes", "calibration/mixed_precision"),
    "Job": ("name", "prune", "notify", "priority", "max_attempts"),
    "Output": (),
}  # fmt: skip

# Options that are not of the document, by the names of their parameters; others are Output.
_OWN = {
    "Text": (
        "report_path", "report_text", "report_dataset", "report_dataset_config", "report_data_file",
        "report_split", "report_field", "report_windows", "max_windows", "split", "bundle_path",
        "text", "confirm_text",
    ),
    "Method": (
        "config_path", "config_paths", "method", "methods", "presets", "ablation", "seeds",
        "other_family", "from_library", "library", "force", "pattern", "patterns", "scope",
        "within", "step", "lowest", "highest",
    ),
    "Search": ("study", "search", "trials", "seed"),
    "Machine": ("device", "device_map", "card", "device_memory", "main_memory", "stream"),
    "Job": (
        "job_file", "name", "notify", "priority", "idempotency_key", "wait", "url",
    ),
}  # fmt: skip


def group_of_field(path: str) -> str:
    """Return the section of a field of the document; the nearest part that is named says it."""
    while path:
        for title, paths in GROUPS.items():
            if path in paths:
                return title
        path = path.rpartition("/")[0]
    return "Output"


class GroupedCommand(click.Command):
    """A verb whose --help has its options in sections."""

    def groups(self) -> Mapping[str, str]:
        """Return the sections of options by the names of their parameters, where they are known."""
        return {name: title for title, names in _OWN.items() for name in names}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options in sections."""
        groups = self.groups()
        for title in GROUPS:
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
