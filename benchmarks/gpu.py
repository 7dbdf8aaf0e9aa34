"""
The whole job on one GPU, on the shapes of published models: `make bench-gpu`.

Random weights and random tokens: what work costs does not depend on what they say. Of each shape:
loading, hashing, calibration, 200 trials, confirmation, every step of the pipeline on one block,
Wanda and SparseGPT, pruning, saving and recovery, with the peaks of memory beside the plan's; then
whether two runs are the same bits, ratings and masks those of the CPU, statistics those of float32,
and what recoveries of a small model gain as much as on the CPU.

    python benchmarks/gpu.py                                  # all shapes, into bench-gpu.json
    python benchmarks/gpu.py --shape llama-2-7b               # ten minutes at most on an H100
    python benchmarks/gpu.py --tables bench-gpu.json          # for docs/measurements/speed.md
    python benchmarks/gpu.py --device cpu --shape tiny --context-length 64   # tries it out
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from gpu_parts import (
    Clock,
    masks_apart,
    ratings_apart,
    recovery_gains,
    statistics_apart,
    tensors_apart,
)
from gpu_shapes import SHAPES, Shape, random_text, write_model
from gpu_tables import print_shape, write_tables
from machine import card, conditions, software

from pho_service.cli.terminal import progress, say, verb
from pho_service.host.files import write_json
from pho_service.models.blockwise import Block, walk
from pho_service.models.bundle_file import read_bundle, write_bundle
from pho_service.models.calibration import calibrate
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.texts import GivenWindows, RecoveryText, ReportText
from pho_service.pipeline.compare import compare_candidates
from pho_service.pipeline.pipeline import finished_block
from pho_service.pipeline.prune import prune_job
from pho_service.pipeline.recover import PrunedModel, recover_model
from pho_service.pipeline.search import opened_study, search_job
from pho_service.pipeline.work import Work
from pho_service.planning.costs import CARDS, Machine
from pho_service.planning.plan import Plan, plan_job
from pho_service.planning.shapes import read_shapes
from pho_service.progress import Run
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.hardware import pick_device
from pho_service.pruning.masks import linear_masks
from pho_service.pruning.steps import InputMoments
from pho_service.spec.baselines import comparison_baselines
from pho_service.spec.calibration import CalibrationSettings
from pho_service.spec.job import JobSpec
from pho_service.spec.pattern import Coefficients, Pattern
from pho_service.spec.recovery import Recovery, Trains
from pho_service.spec.space import Preset
from pho_service.spec.steps import Candidate, Steps
from pho_service.tuning.plan import SearchRequest

WHOLE = ("llama-2-7b", "llama-3-8b", "llama-3-70b-block", "mixtral-block")
HALF, GROUPS = Pattern.parse("0.5", "layer"), Pattern.parse("2:4")
SCORE = Coefficients(row=1, column=0.5, neighbourhood=0.5)
STEPS: tuple[tuple[str, Pattern, Steps], ...] = (
    ("permutation score, 2:4", GROUPS, Steps(permutation="score", update="obs")),
    ("re-pruning dsnot", HALF, Steps(repruning="dsnot")),
    ("re-pruning swaps", HALF, Steps(repruning="swaps")),
    ("re-pruning swaps, 2:4", GROUPS, Steps(repruning="swaps")),
    ("update obs", HALF, Steps(update="obs")),
    ("update least squares", HALF, Steps(update="least-squares")),
    ("update sparsegpt", HALF, Steps(update="sparsegpt")),
    ("update sparsegpt, 2:4", GROUPS, Steps(update="sparsegpt")),
)
FLOAT_WINDOWS = 4  # that statistics in float32 are compared on


@click.command()
@click.option("--device", help="[default: cuda, which has to be there]")
@click.option(
    "--shape", "names", multiple=True, type=click.Choice(list(SHAPES)), default=WHOLE,
    show_default=True,
)  # fmt: skip
@click.option("--samples", default=128, show_default=True, help="Windows of random tokens.")
@click.option("--context-length", default=2048, show_default=True)
@click.option("--windows", default=16, show_default=True, help="That candidates are confirmed on.")
@click.option("--trials", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("bench-gpu.json"), show_default=True,
    help="JSON; the shapes that are in it stay unless they are measured again.",
)  # fmt: skip
@click.option(
    "--tables", type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure nothing, and print the Markdown of such a file.",
)  # fmt: skip
@verb
def main(
    device: str | None,
    names: tuple[str, ...],
    samples: int,
    context_length: int,
    windows: int,
    trials: int,
    seed: int,
    out: Path,
    tables: Path | None,
) -> None:
    """Measure, print tables, and keep all of it in one JSON file."""
    if tables is not None:
        click.echo(write_tables(json.loads(tables.read_text(encoding="utf-8"))))
        return
    if device is None and not torch.cuda.is_available():
        raise click.UsageError(
            "this measures a CUDA device, and torch sees none. Run it on a machine with one and a "
            "CUDA build of torch; --device cpu --shape tiny --context-length 64 tries it out."
        )
    target = pick_device(device or "cuda")
    settings = CalibrationSettings(
        samples=samples, context_length=context_length, bos="never", seed=seed
    )
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for name in names:
        document = {
            "card": card() if target.type == "cuda" else "the CPU, no GPU",
            "machine": conditions(),
            "software": software("torch", "transformers", "optuna"),
            "settings": settings.to_dict(),
            "confirmed_on": windows,
            "trials": trials,
            "like": SHAPES[name].like,
        }
        click.echo(f"{document['card']}; {document['machine']}; {document['software']}")
        with tempfile.TemporaryDirectory(prefix="pho-") as folder:
            job = _Job(SHAPES[name], target, Path(folder), settings, windows, trials)
            found[name] = {**document, **job.measure()}
        write_json(out, found)
        print_shape(name, found[name])
    say(f"All of it is in {out}; --tables {out} prints it for docs/measurements/speed.md.")


class _Job:
    """One shape, from its files to a pruned folder."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        folder: Path,
        settings: CalibrationSettings,
        windows: int,
        trials: int,
    ) -> None:
        self.shape = shape
        self.device = device
        self.folder = folder
        self.settings = settings
        self.trials = trials
        self.clock = Clock(device=device)
        vocabulary = shape.config().vocab_size
        self.text = random_text(settings, vocabulary)
        confirming = replace(settings, samples=windows, seed=settings.seed + 1)
        text = random_text(confirming, vocabulary)
        self.report = ReportText(windows=text.calibration, record=text.record)

    def plan(self, pattern: str, preset: str, **more: Any) -> Plan:
        """What `pho plan` says of this job, on a card of this size."""
        spec = JobSpec.model_validate(
            {
                "model": self.shape.like, "pattern": pattern, "preset": preset,
                "dtype": self.shape.dtype, "stream": self.shape.stream, "trials": self.trials,
                "calibration": {
                    "samples": self.settings.samples,
                    "context_length": self.settings.context_length, "bos": "never",
                },
                "confirm": {"windows": len(self.report.windows)},
                **more,
            }
        )  # fmt: skip
        shapes = read_shapes(self.shape.like, path=str(self.folder / "model"))
        return plan_job(spec, shapes, self.machine())

    def machine(self) -> Machine:
        """One with this memory; its rates are not looked at."""
        card = CARDS["H100"]
        if self.device.type == "cuda":
            return card.resized(torch.cuda.get_device_properties(self.device).total_memory)
        return replace(card, is_gpu=False)

    def measure(self) -> dict[str, Any]:
        """All parts and checks, as JSON values."""
        write_model(self.shape, self.folder / "model", device=self.device, seed=self.settings.seed)
        model = self._part("load", self._load)
        self._part("hash the weights", lambda: model.weights_sha256)
        bundle = self._calibrated(model)
        self._searched(model, bundle)
        self._steps(model, bundle)
        self._baselines(model, bundle)
        checks = {**self._checks(model, bundle), **self._float32(model)}
        self._part("prune and save, best at 2:4", lambda: self._saved(model, bundle))
        planned = {"score": self.plan("0.5", "score"), "best at 2:4": self.plan("2:4", "best")}
        if not model.stream:
            del model  # its memory is that of the dense one now
            train, planned["recovered"] = self._largest_recovery()
            self._part(
                f"recover, training {train}", lambda: self._recovered(train),
                tokens=self.text.calibration.numel(),
            )  # fmt: skip
            checks |= recovery_gains(self.device, self.folder, seed=self.settings.seed)
        return {
            "parts": self.clock.to_list(),
            "checks": checks,
            "blocks_times": self.shape.times,
            "planned": {name: plan.to_dict() for name, plan in planned.items()},
        }

    def _part(self, title: str, work: Callable[[], Any], **about: Any) -> Any:
        say(title)
        return self.clock.part(title, work, times=self.shape.times, **about)

    def _load(self) -> LanguageModel:
        return load_model(
            str(self.folder / "model"), device=str(self.device), dtype=self.shape.dtype,
            stream=self.shape.stream,
        )  # fmt: skip

    def _calibrated(self, model: LanguageModel) -> ProxyBundle:
        path = self.folder / "bundle.safetensors"
        made = self._part(
            "calibrate",
            lambda: calibrate(model, self.text, self.settings, progress),
            tokens=self.text.calibration.numel(),
        )
        self._part("write the bundle", lambda: write_bundle(made, path))
        bundle: ProxyBundle = self._part("read the bundle", lambda: read_bundle(path))
        return bundle

    def _searched(self, model: LanguageModel, bundle: ProxyBundle) -> None:
        """Trials alone, and the same search gone on with to its confirmation."""
        request = SearchRequest(pattern=HALF, trials=self.trials, seed=self.settings.seed)
        run = Run(device=str(self.device), progress=progress)
        with opened_study(
            f"sqlite:///{self.folder / 'study.db'}", request, Work.of(bundle)
        ) as study:
            self._part(
                f"{self.trials} trials",
                lambda: search_job(request, Work.of(bundle), study=study, run=run),
            )
            self._part(
                "confirm",
                lambda: search_job(request, self._work(model, bundle), study=study, run=run),
            )

    def _work(self, model: LanguageModel, bundle: ProxyBundle) -> Work:
        return Work(
            bundles={model.name: bundle}, dense=model, confirm=self.report, report=self.report,
            calibration=self.text.calibration,
        )  # fmt: skip

    def _steps(self, model: LanguageModel, bundle: ProxyBundle) -> None:
        """Every step on the linears of the first block."""
        known = bundle.statistics()
        with _first_block(model, self.text.calibration) as block:
            moments, input_of = self._part(
                "second moments of a block", block.moments, tokens=self.text.calibration.numel()
            )
            for title, pattern, steps in STEPS:
                candidate = Candidate(
                    method="crepe", coefficients=SCORE, pattern=pattern, steps=steps
                )
                self._part(
                    f"{title}, a block",
                    lambda candidate=candidate: _finish(block, known, candidate, moments, input_of),
                )

    def _baselines(self, model: LanguageModel, bundle: ProxyBundle) -> None:
        """The published methods, pruned and measured by us, in the same run."""
        chosen = {c.method: c for c in comparison_baselines(HALF)}
        for name in ("wanda", "sparsegpt"):
            self._part(
                f"{name}, pruned and measured",
                lambda name=name: compare_candidates(
                    self._work(model, bundle), [(name, chosen[name])],
                    run=Run(device=str(self.device), progress=progress),
                ),
            )  # fmt: skip

    def _checks(self, model: LanguageModel, bundle: ProxyBundle) -> dict[str, Any]:
        """Whether results are the same again, and elsewhere."""
        again = calibrate(model, self.text, self.settings, progress)
        differing, tensors = tensors_apart(bundle, again)
        bits, compared = (
            masks_apart(model, bundle, linears=7, seed=self.settings.seed)
            if not model.stream
            else (0, 0)
        )
        return {
            "tensors that differ in a second calibration": [differing, tensors],
            "ratings apart from the CPU's, relative": ratings_apart(
                bundle, self.device, seed=self.settings.seed
            ),
            "bits of masks that differ from the CPU's": [bits, compared],
        }

    def _float32(self, model: LanguageModel) -> dict[str, Any]:
        """Statistics in the model's dtype against those of the same weights in float32."""
        if model.stream:
            return {}
        few = replace(self.settings, samples=min(FLOAT_WINDOWS, self.settings.samples))
        text = random_text(few, self.shape.config().vocab_size)
        stored = calibrate(model, text, few, progress)
        wide = load_model(str(self.folder / "model"), device=str(self.device), dtype="float32")
        apart = statistics_apart(stored, calibrate(wide, text, few, progress))
        return {f"{name}, {self.shape.dtype} from float32": value for name, value in apart.items()}

    def _saved(self, model: LanguageModel, bundle: ProxyBundle) -> None:
        request = SearchRequest(
            pattern=GROUPS,
            steps=Preset.of("best", GROUPS).steps,
            trials=16,
            seed=self.settings.seed,
        )
        found = search_job(
            request, Work.of(bundle), run=Run(device=str(self.device), progress=progress)
        )
        work = Work.of(bundle, model, calibration=self.text.calibration)
        prune_job(work, found.configuration, self.folder / "pruned", progress=progress)

    def _largest_recovery(self) -> tuple[Trains, Plan]:
        """The most that can be trained on this card by the plan."""
        tokens = self.text.calibration.numel()
        for train in ("kept", "norms"):
            recovery = {"tokens": tokens, "train": train}
            plan = self.plan("2:4", "best", prune=True, recovery=recovery)
            if plan.fits:
                break
        return train, plan

    def _recovered(self, train: Trains) -> None:
        """The pruned folder, on other random windows; nothing is won with random weights."""
        other = replace(self.settings, samples=self.settings.samples * 2, seed=7)
        text = random_text(other, self.shape.config().vocab_size)
        pruned = PrunedModel.read(
            self.folder / "pruned", device=str(self.device), dtype=self.shape.dtype
        )
        recover_model(
            pruned,
            lambda: nullcontext(self._load()),
            RecoveryText(
                source=GivenWindows(tokens=text.calibration),
                context_length=self.settings.context_length, bos="never",
            ),
            Recovery(tokens=self.text.calibration.numel(), train=train),
            self.folder / "recovery",
            run=Run(progress=progress),
        )  # fmt: skip


@contextmanager
def _first_block(model: LanguageModel, windows: torch.Tensor) -> Iterator[Block]:
    """The first block in its turn; what is done to it is forgotten if the model is streamed."""
    blocks = walk(model, windows)
    try:
        yield next(blocks)
    finally:
        blocks.close()


def _finish(
    block: Block,
    known: Any,
    candidate: Candidate,
    moments: list[InputMoments],
    input_of: dict[str, int],
) -> None:
    """All linears of a block through a candidate's steps; nothing of the block changes."""
    masks = linear_masks(block.linears, known, candidate)
    for _ in finished_block(block.linears, known, candidate, masks, moments, input_of):
        pass


if __name__ == "__main__":
    main()
