"""
What chooses neurons, heads and blocks: PHO's order and the scores of other tools, on the same
model, windows and sizes, with and without least squares on what stays.

    python benchmarks/cut_scores.py
    python benchmarks/cut_scores.py --model FOLDER --share 0.1 --text book.txt --report other.txt

The scores of Minitron, FLAP and OptiPFair are written here after their papers and code; whoever
has these packages can compare. CRePE's coefficients are searched for neurons, too: an Optuna study
rates them by the exact error of what they would remove. Nothing is chosen on the report text.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import optuna
import torch
from domains import DOMAINS
from machine import conditions
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import pho_service as pho
from pho_service.cli.terminal import print_table, progress, say
from pho_service.models.blockwise import Block, measure_perplexity, walk
from pho_service.models.builtin import smollm2
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.structure import Anatomy, Part, as_cut, block_shapes
from pho_service.models.texts import read_windows
from pho_service.pipeline.structured import DAMPING, Choose, cut_model
from pho_service.pruning.scores import layer_importance
from pho_service.pruning.statistics import watched
from pho_service.pruning.steps import InputMoments
from pho_service.pruning.structured import removal_order
from pho_service.pruning.weight_update import damped
from pho_service.spec.pattern import Coefficients
from pho_service.spec.structure import Structure, split

TRIALS = 200  # of the search for CRePE's coefficients over neurons


def kept_by_score(
    score: Tensor, count: int, *, group: int = 1, within: Tensor | None = None
) -> Tensor:
    """The groups of columns that stay by the sums of their scores, ascending; (count,), int64."""
    totals = score.double().cpu().view(-1, group).sum(dim=1)
    order = len(totals) - 1 - totals.flip(0).argsort(stable=True)  # the lowest first
    turns = torch.zeros(len(totals), dtype=torch.int64)  # how many of its class leave before it
    if within is not None:
        classes = within.cpu()[order]
        for members in map(classes.eq, classes.unique()):
            turns[members] = torch.arange(int(members.sum()))
    order = order[turns.argsort(stable=True)]
    return order[len(order) - count :].sort().values


def magnitude_score(reader: Tensor, writers: Iterable[Tensor]) -> Tensor:
    """Squares of all weights of each neuron (Li et al. 2017, arXiv:1608.08710, for filters)."""
    rows = [writer.float().square().sum(dim=1) for writer in writers]
    return torch.stack([reader.float().square().sum(dim=0), *rows]).sum(dim=0)


def activation_score(mean_magnitudes: Tensor) -> Tensor:
    """The norm over windows of the mean |x| (Minitron, arXiv:2407.14679, as in Model-Optimizer)."""
    return mean_magnitudes.square().sum(dim=0).sqrt()


def fluctuation_score(weight: Tensor, gram: Tensor, mean: Tensor) -> Tensor:
    """The variance of an input times its squared weights (FLAP, arXiv:2312.11983, equation 5)."""
    variance = (gram.diagonal() - mean.square()).clamp_min(0)
    return variance * weight.float().square().sum(dim=0)


def spread_score(writers: Iterable[Tensor]) -> Tensor:
    """The largest and the size of the smallest weight of a neuron's rows (OptiPFair 0.4, MAW)."""
    spreads = [writer.amax(dim=1) + writer.amin(dim=1).abs() for writer in writers]
    return torch.stack(spreads).sum(dim=0).float()


def crepe_score(
    weight: Tensor, gram: Tensor, row_weights: Tensor, coefficients: Coefficients
) -> Tensor:
    """The scores of all weights that read a neuron, added up."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    scores = layer_importance(
        weight, activation_norm=norms, fisher=row_weights, coefficients=coefficients, layer="",
    )  # fmt: skip
    return scores.sum(dim=0)


def coefficients_score(
    coefficients: Coefficients, _block: Block, part: Part, moments: InputMoments,
    row_weights: Tensor,
) -> Tensor:  # fmt: skip
    """As :func:`crepe_score`, of the neurons of a block."""
    return crepe_score(part.reader.weight, moments.gram, row_weights, coefficients)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The linear that reads the neurons of a block, and the moments of what it reads."""

    weight: Tensor
    gram: Tensor
    row_weights: Tensor
    inverse: Tensor  # Of the damped moments, float64

    @classmethod
    def of(cls, block: Block, part: Part, row_weights: Tensor) -> "Reader":
        """That of a block, run on its windows."""
        (moments,), _ = block.only([part.reader.name]).moments()
        matrix = damped(moments.gram, DAMPING, layer=part.reader.name).double()
        return cls(
            weight=part.reader.weight.detach().float().clone(),
            gram=moments.gram,
            row_weights=row_weights,
            inverse=torch.cholesky_inverse(torch.linalg.cholesky(matrix)),
        )

    def order(self, count: int) -> Tensor:
        """The neurons that stay in PHO's order."""
        order = removal_order(
            self.weight, self.gram, self.row_weights, damping=DAMPING, layer="",
        )  # fmt: skip
        return order.kept(count)

    def error(self, kept: Tensor) -> float:
        """Half the weighted error of the outputs after least squares on what stays, exact."""
        is_gone = torch.ones(len(self.gram), dtype=torch.bool)
        is_gone[kept] = False
        lost = self.weight[:, is_gone].double()
        lower = torch.linalg.cholesky(self.inverse[is_gone][:, is_gone])
        solved = torch.linalg.solve_triangular(lower, lost.T, upper=False)
        return float(self.row_weights.double() @ solved.square().sum(dim=0)) / 2


def readers(model: LanguageModel, windows: Tensor, fisher: Mapping[str, Tensor]) -> list[Reader]:
    """Those of all blocks, in the dense model."""
    anatomy, of_blocks = Anatomy(model), []
    with progress("Reading moments", len(anatomy.blocks)) as advance:
        for block in walk(model, windows):
            part = anatomy.neurons(block.name)
            of_blocks.append(Reader.of(block, part, fisher[part.reader.name]))
            advance(1)
    return of_blocks


def searched_coefficients(of_blocks: Sequence[Reader], count: int) -> tuple[Coefficients, float]:
    """The coefficients by which least is lost if so many neurons stay, and what that is."""

    def lost(trial: optuna.Trial) -> float:
        coefficients = Coefficients(
            row=trial.suggest_float("row", 0, 1),
            column=trial.suggest_float("column", 0, 1),
            neighbourhood=trial.suggest_float("neighbourhood", 0, 1),
            kernel_size=trial.suggest_int("kernel_size", 3, 15, step=4),
            activation_exponent=trial.suggest_float("activation_exponent", 0, 2),
            gradient_exponent=trial.suggest_float("gradient_exponent", 0, 1),
            normalisation=trial.suggest_categorical("normalisation", ["mean", "none"]),
        )
        trial.set_user_attr("coefficients", coefficients.to_dict())
        scores = (crepe_score(r.weight, r.gram, r.row_weights, coefficients) for r in of_blocks)
        return sum(
            reader.error(kept_by_score(score, count))
            for reader, score in zip(of_blocks, scores, strict=True)
        )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    with progress("Searching coefficients", TRIALS) as advance:
        study.optimize(lost, TRIALS, callbacks=[lambda *_: advance(1)])
    return Coefficients(**study.best_trial.user_attrs["coefficients"]), study.best_value


def mean_magnitudes(block: Block, part: Part) -> Tensor:
    """(windows, in_features): the mean size of each input of a part's reader."""
    means: list[Tensor] = []

    def see(_name: str, x: Tensor, _output: Tensor) -> None:
        means.append(x.detach().float().abs().flatten(end_dim=-2).mean(dim=0))

    with watched({part.reader.name: part.reader}, see):
        for window in range(len(block.inputs)):
            block.run(window)
    return torch.stack(means)


Score = Callable[[Block, Part, InputMoments, Tensor], Tensor]


def by_score(score: Score) -> Choose:
    """What a cut chooses by, from scores of a part's input columns."""

    def choose(
        block: Block, part: Part, count: int, moments: InputMoments, row_weights: Tensor
    ) -> Tensor:
        values = score(block, part, moments, row_weights)
        return kept_by_score(values, count, group=part.group, within=part.within)

    return choose


def _writers(part: Part) -> list[Tensor]:
    return [writer.weight for writer in part.writers]


CHOICES: dict[str, Choose | None] = {
    "PHO": None,
    "Minitron": by_score(lambda block, part, *_: activation_score(mean_magnitudes(block, part))),
    "FLAP": by_score(lambda _, p, m, __: fluctuation_score(p.reader.weight, m.gram, m.mean)),
    "OptiPFair": by_score(lambda _, part, *__: spread_score(_writers(part))),
    "magnitude": by_score(lambda _, p, *__: magnitude_score(p.reader.weight, _writers(p))),
}


@click.command()
@click.option("--model", "folder", help="A folder; SmolLM2-135M by default.")
@click.option("--text", help="Calibration; a part of Python's documentation by default.")
@click.option("--report", help="Measured on; another part of it by default.")
@click.option("--share", "shares", multiple=True, type=float, default=(0.1, 0.2))
@click.option("--samples", default=16, show_default=True)
@click.option("--context-length", default=512, show_default=True)
@click.option("--windows", default=16, show_default=True, help="Of the report text.")
@click.option("--out", type=click.Path(path_type=Path), help="All numbers, as JSON.")
def main(
    folder: str | None,
    text: str | None,
    report: str | None,
    shares: tuple[float, ...],
    samples: int,
    context_length: int,
    windows: int,
    out: Path | None,
) -> None:
    """Cut the neurons of a model by each score, and blocks by divergence; measure each cut."""
    disable_progress_bar()
    say(conditions())
    folder = folder or str(smollm2())
    model = load_model(folder, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as place:
        texts = DOMAINS["docs"](Path(place))
        bundle = pho.calibrate(
            model.model, model.tokenizer, text or str(texts["calibration"]), samples=samples,
            context_length=context_length,
        )  # fmt: skip
        rated, _ = read_windows(
            model, TextSource(path=report or str(texts["report"])),
            context_length=context_length, bos="auto", max_windows=windows,
        )  # fmt: skip
    dense = measure_perplexity(model, rated)
    shapes, rows, results = block_shapes(Anatomy(model)), [], []
    blocks_fisher = bundle.statistics().fisher
    for share in shares:
        structures = split(share, shapes)
        narrow = next(s for s in structures if s.query_heads is None and not s.dropped)
        shallow = Structure(dropped=max(1, round(share * shapes.layers)))
        assert narrow.neurons is not None
        of_blocks = readers(model, bundle.text.calibration, blocks_fisher)
        best, lost = searched_coefficients(of_blocks, narrow.neurons)
        ours = sum(reader.error(reader.order(narrow.neurons)) for reader in of_blocks)
        say(f"PHO's order: an exact error of {ours:.4f} nats in the dense model's blocks")
        say(f"CRePE over neurons, {TRIALS} trials: {lost:.4f} nats, by {best.to_dict()}")
        choices = {**CHOICES, "CRePE, searched": by_score(partial(coefficients_score, best))}
        cuts = [(name, narrow, choose) for name, choose in choices.items()]
        for name, structure, choose in [*cuts, ("blocks by divergence", shallow, None)]:
            values = []
            for update in (True, False):
                copied = as_cut(replace(model, model=copy.deepcopy(model.model)))
                cut = cut_model(
                    copied, bundle.text.calibration, structure, fisher=blocks_fisher,
                    choose=choose, update=update, progress=progress,
                )  # fmt: skip
                values.append(measure_perplexity(cut.model, rated))
            removed = shapes.removed_share(structure)
            rows.append((
                f"{removed:.1%}", name, f"{values[0].perplexity:.2f}",
                str(values[0].against(dense)), f"{values[1].perplexity:.2f}",
            ))  # fmt: skip
            results.append({
                "share": share, "removed": removed, "by": name, "structure": structure.to_dict(),
                "perplexity": values[0].perplexity, "without_update": values[1].perplexity,
            })  # fmt: skip
            say(" ".join(rows[-1]))
    print_table(
        f"{Path(folder).name}, dense {dense.perplexity:.2f} on {dense.windows} windows",
        ("removed", "chosen by", "perplexity", "against dense", "without least squares"),
        rows,
    )
    if out is not None:
        out.write_text(json.dumps({"dense": dense.perplexity, "rows": results}, indent=2))


if __name__ == "__main__":
    main()
