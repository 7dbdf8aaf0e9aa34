"""
A model by a search of its own, by `pho prune`: pruned, or cut by a share, size, speed or bytes.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from pho_service.cli.document import Given
from pho_service.cli.minutes import budget_of
from pho_service.cli.options import Terminal, calibration_source, check_models
from pho_service.cli.recover import recover_pruned, recovery_text, show_recovered
from pho_service.cli.terminal import print_json, progress, say, show_table
from pho_service.errors import InvalidInput
from pho_service.spec.document import AFTER, MACHINE, PRUNED, FieldShown
from pho_service.spec.export import BITS_WINDOWS, GgufType, RuntimeName
from pho_service.spec.pattern import Pattern
from pho_service.spec.structure import BY_SPEED, IN_BYTES, OF_FILE, Goal, Structure, is_structured

if TYPE_CHECKING:
    from pho_service.pipeline.prune import PrunedFolder
    from pho_service.pipeline.work import Work
    from pho_service.spec.configuration import Configuration
    from pho_service.spec.export import Exported
    from pho_service.spec.recovery import Recovered
    from pho_service.tuning.result import SearchResult

ROUNDED = 0.005  # that a sparsity may be below what was asked for without a word
CUT_WINDOWS = 8  # that cuts are compared on, of those that the calibration leaves


@dataclass(frozen=True, kw_only=True)
class CutAsk:
    """
    Say how small or fast the model is to be.

    Attributes:
        smaller: Share of the model's file that leaves: 20% is --pattern smaller:20%. So much more
            of the blocks is cut, as embeddings stay.
        faster: How many times as fast the model is to write here, instead of --pattern: 1.2x. A
            trial cut says what share of the blocks that takes.
        bytes: The most that a GGUF file of the model may have, instead of --pattern: 95MB. What is
            cut and the bits of each linear are chosen together, and OUT gets the file, too.
        runtime: Where --faster is measured: torch, the default, or llama.cpp.
        type: Type of the files in llama.cpp; q8_0 by default.
        no_recovery: Do not train a smaller model in what the minutes leave.
    """

    smaller: Annotated[str | None, FieldShown(section=PRUNED)] = None
    faster: Annotated[str | None, FieldShown(section=PRUNED)] = None
    bytes: Annotated[str | None, FieldShown(section=PRUNED)] = None
    runtime: Annotated[RuntimeName | None, FieldShown(section=MACHINE)] = None
    type: Annotated[GgufType | None, FieldShown(section=MACHINE)] = None
    no_recovery: Annotated[bool, FieldShown(section=AFTER)] = False

    @property
    def cut(self) -> str | None:
        """The pattern that says the same; None where nothing is said."""
        if self.smaller is not None:
            return f"{OF_FILE}{self.smaller}"
        if self.bytes is not None:
            return f"{IN_BYTES}{self.bytes.replace(' ', '')}"
        if self.faster is not None:
            where = filter(None, (self.runtime, self.type))
            return ":".join([f"{BY_SPEED}{self.faster}", *where])
        return None

    @property
    def options(self) -> dict[str, str | None]:
        """What says how much is cut, by its name."""
        return {**self._budgets, **self._where}

    @property
    def _budgets(self) -> dict[str, str | None]:
        return {"--smaller": self.smaller, "--faster": self.faster, "--bytes": self.bytes}

    @property
    def _where(self) -> dict[str, str | None]:
        return {"--runtime": self.runtime, "--type": self.type}

    def asked_search(self, pattern: str | None, *, alone: bool) -> str:
        """
        The option that a search is for, with its value; "" if there is none. A pattern of zeros is
        for one if nothing else says how a model is pruned: it stands ``alone``.

        Raises:
            InvalidInput: More than one does, or where a speed is measured is said without one.
        """
        asked = {"--pattern": pattern, **self._budgets}
        words = [f"{name} {value}" for name, value in asked.items() if value is not None]
        is_budget = any(self._budgets.values())
        if len(words) > 1 and is_budget:
            raise InvalidInput(f"{' and '.join(words)} each say what is cut. Give one.")
        if where := [n for n, v in self._where.items() if v is not None and self.faster is None]:
            raise InvalidInput(
                f"{', '.join(where)}: where --faster 1.2x is measured. Leave it out, or give that."
            )
        if self.type is not None and self.runtime != "llama.cpp":
            raise InvalidInput(
                f"--type {self.type}: only for --runtime llama.cpp. Leave it out, or give that."
            )
        return words[0] if words and (is_budget or is_structured(pattern) or alone) else ""


def prune_by_search(
    model: str, pattern: Pattern, folder: Path, given: Given, as_json: bool, inputs: Terminal,
    no_recovery: bool,
) -> None:  # fmt: skip
    """Find the best for a pattern, as `pho search` does, and save the model, recovered."""
    from pho_service.pipeline.faster import speed_of, speed_sentence
    from pho_service.pipeline.prune import prune_job, winner_of
    from pho_service.pipeline.search import opened_study, search_job

    began, goal = time.monotonic(), pattern.goal
    texts = (given(f"{part}/text") for part in ("confirm", "report", "recovery"))
    check_models([model], inputs.revision, *texts)
    # What an interrupted run has measured is there when the same command is given again.
    place = folder.expanduser().resolve().with_name(f".{folder.name}.search")
    study_url = f"sqlite:///{place}/study.db"
    document: dict[str, Any] = {
        "model": model, "pattern": str(pattern), "scope": pattern.free_scope, "prune": True,
    }  # fmt: skip
    document |= {"confirm": {"windows": CUT_WINDOWS}} if pattern.structured else {}
    document |= {"recovery": None} if no_recovery else {}
    asked = given.job(given.document(document))
    source = calibration_source(asked.calibration)
    budget = budget_of(asked, source, study_url, inputs, began)
    settings = budget.spec.calibration.settings()
    with budget.bar():
        work = inputs.calibrated(
            budget.model, source, settings, budget.spec.confirm,
            report=budget.spec.report, requests=[budget.spec.request(0)],
        )  # fmt: skip
        request = budget.calibrated(asked, work).request(0)
        place.mkdir(parents=True, exist_ok=True)
        with opened_study(study_url, request, work) as study:
            budget.note(study)
            result = search_job(request, work, study=study, run=budget.run(inputs, work, study))
            configuration, pruned, recovered = result.configuration, None, None
            whole = configuration.cut is not None and configuration.cut.is_nothing
            recovery = None if whole else budget.recovery(work, study)
        first = folder if recovery is None else place / "pruned"
        shutil.rmtree(place / "pruned", ignore_errors=True)  # of an interrupted run
        if not whole:  # else the model is there already
            blocks = work.blocks(winner_of(configuration))
            pruned = prune_job(work, configuration, first, memo=blocks, progress=progress)
        text = recovery_text(budget.spec, work)
        del work  # whose model is not dense any more
        budget.model = model
        if recovery is not None:
            recovered = recover_pruned(first, model, text, recovery, folder, inputs)
    shutil.rmtree(place)
    if says := configuration.search.get("goal", {}).get("says"):
        say(says)
    if not as_json:
        _show(model, folder, result, pruned, recovered)
    exported = speed = None
    if goal is not None and goal.size:
        exported = _exported(model if whole else str(folder), folder, goal, given, inputs)
        if not as_json:
            say(f"{exported}")
    elif goal is not None:
        speed = speed_of(
            lambda: inputs.model(model), model, str(folder), goal,
            device=inputs.device, dtype=inputs.dtype, progress=progress,
        )  # fmt: skip
        if not as_json:
            show_table(speed.table)
            say(speed_sentence(goal, speed))
    if as_json:
        print_json(
            {
                "out": str(folder),
                "configuration": configuration.model_dump(mode="json"),
                "warnings": result.warnings,
                **({} if pruned is None else _values(configuration, pruned)),
                **({} if recovered is None else {"recovery": recovered.to_dict()}),
                **({} if exported is None else {"gguf": exported.to_dict()}),
                **({} if speed is None else {"speed": [asdict(side) for side in speed.sides]}),
            }
        )


def _show(
    model: str,
    folder: Path,
    result: "SearchResult",
    pruned: "PrunedFolder | None",
    recovered: "Recovered | None",
) -> None:
    """How good the model is that was saved, if it is another one, and what it was chosen from."""
    from pho_service.shown.report import Report
    from pho_service.shown.tables import results_table, verdict_table, ways_table

    configuration = result.configuration
    for warning in result.warnings:
        say(f"Note: {warning}")
    if ways := configuration.search.get("goal", {}).get("ways"):
        show_table(ways_table(ways))
    if pruned is None:
        return
    good = configuration.headline
    assert good is not None  # the dense model was measured
    for table in (verdict_table(good), results_table(Report.of(configuration))):
        if table is not None:
            show_table(table)
    show_pruned(folder, configuration, pruned)
    if configuration.cut is not None:
        say("It is an ordinary model.")
    if recovered is None:
        say(f"Win back some of what was lost: `pho recover {folder} --teacher {model}`.")
    else:
        say(f"{recovered}.")
        show_recovered(recovered)


def show_pruned(folder: Path, configuration: "Configuration", pruned: "PrunedFolder") -> None:
    """What a folder has less than the dense model."""
    from pho_service.pipeline.prune import orders_in_words
    from pho_service.pruning.reconstruction import summary

    if configuration.cut is not None:
        click.echo(f"{folder}: {configuration.cut}")
        return
    click.echo(f"{folder}: {pruned.sparsity:.4%} of {len(pruned.layers)} linears removed")
    candidate = configuration.candidate()
    pattern, rows = candidate.pattern, candidate.pattern.scope == "row"
    if rows and not candidate.steps.linears and pattern.sparsity - pruned.sparsity > ROUNDED:
        say(
            f"{pattern} was asked for: of each row a whole number of weights is removed, and rows "
            "are short here."
        )
    if pruned.orders:
        click.echo(orders_in_words(pruned.orders))
    if pruned.blocks:
        click.echo(f"{summary(pruned.blocks)}.")


def pruned_values(pruned: "PrunedFolder") -> dict[str, Any]:
    """The same as JSON values, of a model that has zeros."""
    return {
        "sparsity": pruned.sparsity,
        "layers": pruned.layers,
        **({"orders": pruned.orders} if pruned.orders else {}),
        **({"blocks": pruned.recipe["blocks"]} if pruned.blocks else {}),
    }


def _values(configuration: "Configuration", pruned: "PrunedFolder") -> dict[str, Any]:
    """The same of a model that has zeros or is smaller."""
    if configuration.cut is None:
        return pruned_values(pruned)
    return {"structure": pruned.recipe["structure"]}


def calibrated_few(
    model: str, given: Given, inputs: Terminal, *, least: int | None = None
) -> "Work":
    """
    A model calibrated on few windows of up to 512 tokens, where no sizes are given; a file's bytes
    that are too few for any cut of it are refused before.
    """
    from pho_service.models.gguf_file import check_room  # slow to import

    loaded = inputs.model(model)
    if least is not None:
        check_room(loaded, least)
    how = given.calibration()
    for name, few in (
        ("samples", BITS_WINDOWS),
        ("context_length", min(512, loaded.longest or 512)),
    ):
        if f"calibration/{name}" not in given.said:
            how = how.model_copy(update={name: few})
    return inputs.calibrated(loaded, calibration_source(how), how.settings())


def _exported(model: str, folder: Path, goal: Goal, given: Given, inputs: Terminal) -> "Exported":
    """A model as a file of at most so many bytes, in a folder."""
    from pho_service.pipeline.export import check_export, export

    file = f"{folder.name}-{goal.size}.gguf"
    check_export(Path(model), folder.with_name(file))
    folder.mkdir(parents=True, exist_ok=True)
    work = calibrated_few(model, given, inputs)
    return export(
        model, folder / file, most=goal.bytes, bundle=work.bundle, windows=work.calibration,
        memo=work.blocks(Structure()), device=inputs.device, progress=progress,
    )  # fmt: skip
