"""
The `pho` command: one file a verb, nothing heavy imported before a verb runs.
"""

import difflib
import importlib

import click

from pho_service.errors import told_to

# Each verb's module, and what `pho --help` says of it, so that the module need not be imported.
LOCAL_VERBS = {
    "plan": (
        "plan",
        "Estimate what a search takes: memory, disk and time.",
    ),
    "calibrate": ("calibrate", "Run a model once over a text and write its proxy bundle."),
    "search": ("search", "Find the best coefficients for a model, and confirm them by perplexity."),
    "curve": ("curve", "Show how good a model still is at each of several sparsities."),
    "prune": ("prune", "Prune a model with a configuration and save it."),
    "recover": ("recover", "Train a pruned or smaller model towards the dense one."),
    "pack": ("prune", "Make a model folder smaller, without losing a bit."),
    "unpack": ("prune", "Restore the folder that was packed."),
    "export": ("prune", "Write a model folder as a GGUF file, for llama.cpp."),
    "push": ("prune", "Upload a pruned folder to the Hugging Face hub."),
    "bench": ("compare", "Measure how fast models load, read and write on this machine."),
    "evaluate": ("compare", "Print the perplexity of a model on a text."),
    "generate": ("compare", "Print how a model goes on with a prompt, beside another one."),
    "compare": ("compare", "Print a table of perplexities: dense, published methods, found."),
    "transfer": ("transfer", "Measure what a configuration is worth on other models."),
    "report": ("report", "Write a job or a study as one page of HTML that needs no network."),
    "validate": ("calibrate", "Measure how well the proxies rank candidates on a model."),
    "doctor": ("doctor", "Look at this machine: device, hub, caches, extras, database and disk."),
    "demo": ("demo", "Run the main job on SmolLM2-135M, with built-in texts and settings."),
    "example": ("demo", "Write SmolLM2-135M and three texts to a folder, to try things on."),
}
SERVICE_VERBS = {
    "serve": ("serve", "Serve search jobs over HTTP, with workers and a dashboard."),
    "worker": ("serve", "Work for a service, from any machine."),
    "backup": ("serve", "Write everything in a service's database to one file."),
    "restore": ("serve", "Fill an empty database with such a file."),
    "migrate": ("serve", "Create a service's tables, or bring them to this version."),
    "keys": ("serve", "Create, list, rotate and revoke the keys of a service."),
    "submit": ("remote", "Submit a search job to a service."),
    "fork": ("remote", "Submit a job that begins with the trials of another one."),
    "jobs": ("remote", "List the jobs of a service."),
    "show": ("remote", "Show a job with its progress."),
    "watch": ("remote", "Wait for a job, with progress bars."),
    "best": ("remote", "Get the best configuration of a job."),
    "pull": ("remote", "Download the pruned model of a job, and check it."),
    "transfer-job": (
        "remote", "Measure what a job has found on other models, by the service.",
    ),
    "cancel": ("remote", "Cancel a job for good."),
    "pause": ("remote", "Pause a job."),
    "resume": ("remote", "Continue a job that is paused or has failed."),
    "extend": ("remote", "Give a job more trials."),
    "delete": ("remote", "Delete a job that is over or paused."),
    "configurations": (
        "configurations", "Find what was found before, for other models; import and export it.",
    ),
    "workers": ("remote", "List the workers of a service, or have one end."),
}  # fmt: skip
VERBS = LOCAL_VERBS | SERVICE_VERBS


class _Verbs(click.Group):
    """Imports a verb when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"pho_service.cli.{VERBS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            meant = difflib.get_close_matches(args[0], VERBS)
            if not meant:
                raise
            ways = " or ".join(f"'{name}'" for name in meant)
            raise click.UsageError(f"{error.message} Did you mean {ways}?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        for title, verbs in (("Verbs", LOCAL_VERBS), ("Verbs of the service", SERVICE_VERBS)):
            with formatter.section(title):
                formatter.write_dl([(name, about) for name, (_, about) in verbs.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pho-service")
@click.pass_context
def main(context: click.Context) -> None:
    """
    Prune large language models: find the best way in minutes.

    \b
    Example: search SmolLM2 for 50 % sparsity, prune it, measure it.
      pho search HuggingFaceTB/SmolLM2-135M --pattern 0.5 --text calibration.txt
      pho prune HuggingFaceTB/SmolLM2-135M --config config.json --out pruned
      pho evaluate pruned --text report.txt

    Each verb has its own --help. Exit codes: 0 done, 1 failed, 2 bad usage.
    """
    from pho_service.cli.document import option

    context.with_resource(told_to(option))
