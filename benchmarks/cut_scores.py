"""
What chooses neurons, heads and blocks: PHO's order and the scores of other tools, on the same
model, windows and sizes, with and without least squares on what stays.

    python benchmarks/cut_scores.py
    python benchmarks/cut_scores.py --model FOLDER --share 0.1 --text book.txt --report other.txt

The scores of Minitron, FLAP and OptiPFair are written here after their papers and code; whoever has
these packages can compare. Nothing is chosen on the report text.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import click
import torch
from domains import DOMAINS
from machine import conditions
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import pho_service as pho
from pho_service.cli.terminal import print_table, progress, say
from pho_service.models.blockwise import Block, measure_perplexity
from pho_service.models.builtin import smollm2
from pho_service.models.data_sets import TextSource
from pho_service.models.loading import load_model
from pho_service.models.structure import Anatomy, Part, as_cut, block_shapes
from pho_service.models.texts import read_windows
from pho_service.pipeline.structured import Choose, cut_model
from pho_service.pruning.statistics import watched
from pho_service.pruning.steps import InputMoments
from pho_service.spec.structure import Structure, split


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


def mean_magnitudes(block: Block, part: Part) -> Tensor:
    """(windows, in_features): the mean size of each input of a part's reader."""
    means: list[Tensor] = []

    def see(_name: str, x: Tensor, _output: Tensor) -> None:
        means.append(x.detach().float().abs().flatten(end_dim=-2).mean(dim=0))

    with watched({part.reader.name: part.reader}, see):
        for window in range(len(block.inputs)):
            block.run(window)
    return torch.stack(means)


def by_score(score: Callable[[Block, Part, InputMoments], Tensor]) -> Choose:
    """What a cut chooses by, from scores of a part's input columns."""

    def choose(
        block: Block, part: Part, count: int, moments: InputMoments, _weights: Tensor
    ) -> Tensor:
        values = score(block, part, moments)
        return kept_by_score(values, count, group=part.group, within=part.within)

    return choose


def _writers(part: Part) -> list[Tensor]:
    return [writer.weight for writer in part.writers]


CHOICES: dict[str, Choose | None] = {
    "PHO": None,
    "Minitron": by_score(lambda block, part, _: activation_score(mean_magnitudes(block, part))),
    "FLAP": by_score(lambda _, p, m: fluctuation_score(p.reader.weight, m.gram, m.mean)),
    "OptiPFair": by_score(lambda _, part, __: spread_score(_writers(part))),
    "magnitude": by_score(lambda _, p, __: magnitude_score(p.reader.weight, _writers(p))),
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
        cuts = [(name, narrow, choose) for name, choose in CHOICES.items()]
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
