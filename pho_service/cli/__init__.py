"""
The `pho` command: one file a verb, nothing heavy imported before a verb runs.
"""

import importlib

import click

# What `pho --help` says of each verb, so that it need not import them.
VERBS = {
    "calibrate": "Run a model once over a text and write its proxy bundle.",
    "search": "Find the best coefficients for a model, and confirm them by perplexity.",
    "prune": "Prune a model with a configuration and save it.",
    "evaluate": "Print the perplexity of a model on a text.",
    "compare": "Print a table of perplexities: dense, the published methods, configurations.",
    "validate": "Measure how well the proxies rank candidates on a model.",
    "demo": "Do all of it on SmolLM2-135M, with texts and settings that are built in.",
}


class _Verbs(click.Group):
    """Imports a verb when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"pho_service.cli.{cmd_name}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pho-service")
def main() -> None:
    """
    Find pruning coefficients for large language models in minutes.

    \b
    Example: search SmolLM2 for 50 % sparsity, prune it, measure it.
      pho search HuggingFaceTB/SmolLM2-135M --pattern 0.5 --text calibration.txt
      pho prune HuggingFaceTB/SmolLM2-135M --config config.json --out pruned
      pho evaluate pruned --text report.txt

    Each verb has its own --help. Exit codes: 0 done, 1 failed, 2 bad usage.
    """
