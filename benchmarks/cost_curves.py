"""
How seconds and memory grow with trials, rows a layer, model size and calibration tokens.

Every point is measured in a process of its own, so that the peak memory is
that point's. Results are kept in a file, one line a point, so that an
interrupted run goes on where it was; after a change of the program, begin a new
file. `make bench-curves` takes about 40 minutes on 2 cores, or

    python benchmarks/cost_curves.py --curve trials --curve rows
    python benchmarks/cost_curves.py --quick --out quick.jsonl --plots .
"""

import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from cost_point import PATTERN, SCOPE, Conditions
from kept_results import KeptResults
from machine import card, conditions

from pho_service.cli.terminal import print_table, say

MIB = 2**20
AT_MOST_LINEAR = 1.1  # as an exponent, timings being noisy


@dataclass(frozen=True, kw_only=True)
class Curve:
    """
    Points that differ in one field of their conditions.

    Attributes:
        axis: What the field means, with its unit.
        field: Of `Conditions`.
        values: Of the field.
        tasks: What is measured at each point.
        fixed: Fields that differ from the defaults.
    """

    axis: str
    field: str
    values: tuple[Any, ...]
    tasks: tuple[str, ...]
    fixed: dict[str, Any] = field(default_factory=dict)


CURVES = {
    "trials": Curve(
        axis="trials", field="trials", values=(50, 100, 200, 500, 1000, 2000), tasks=("search",)
    ),
    "rows": Curve(
        axis="rows a layer", field="rows", values=(8, 16, 32, 64, 128), tasks=("search",)
    ),
    "models": Curve(
        axis="parameters, billions", field="size", values=("0.1", "0.3", "1", "3"),
        tasks=("calibrate", "search"),
    ),
    "tokens": Curve(
        axis="calibration tokens", field="windows", values=(4, 8, 16, 32, 64), tasks=("calibrate",)
    ),
    "models-gpu": Curve(
        axis="parameters, billions", field="size", values=("0.3", "1", "3", "7", "13"),
        tasks=("calibrate", "search"),
        fixed={"device": "cuda", "dtype": "bfloat16", "windows": 16, "context_length": 2048},
    ),
}  # fmt: skip
QUICK = Conditions(size="tiny", windows=4, context_length=32, trials=8)
QUICK_VALUES: dict[str, tuple[Any, ...]] = {
    "trials": (8, 16), "rows": (8, 16), "models": ("tiny", "tiny-deep"), "tokens": (4, 8),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Series:
    """One task along one curve: where, and what it cost there."""

    curve: Curve
    task: str
    first: Conditions  # those of the first point
    at: list[float]
    costs: list[dict[str, Any]]

    def values(self, name: str, unit: float = 1) -> list[float]:
        """A field of the costs, or what grew over what was there before."""
        if name == "growth_bytes":
            return [(c["peak_bytes"] - c["before_bytes"]) / unit for c in self.costs]
        return [c[name] / unit for c in self.costs]

    def caption(self) -> str:
        """All that the points have in common, and what they ran on."""
        fixed = self.first
        tokens = f"{fixed.windows} x {fixed.context_length}"
        if self.curve.field == "windows":
            tokens = f"windows of {fixed.context_length}"
        parts = [
            "random LLaMAs" if self.curve.field == "size" else f"random LLaMA of {_size(fixed)}",
            f"{fixed.dtype} on {fixed.device}",
            f"calibrated on {tokens} random tokens, a quarter of them backward",
        ]
        if self.curve.field != "rows":
            parts.append(f"{fixed.rows} rows a layer")
        if self.task == "search":
            trials = "" if self.curve.field == "trials" else f"{fixed.trials} trials, "
            parts.append(f"{trials}pattern {PATTERN} in scope {SCOPE}, study in SQLite")
        parts.append(f"seed {fixed.seed}")
        ran_on = dict.fromkeys(f"{c['machine']}, {c['threads']} threads" for c in self.costs)
        used = dict.fromkeys(c["software"] for c in self.costs)
        loads = self.values("load")
        busy = f"load {min(loads):.1f} to {max(loads):.1f} when a point began"
        return f"{', '.join(parts)}. {'; '.join([*ran_on, *used])}; {busy}"


@click.command()
@click.option("--curve", "names", multiple=True, type=click.Choice(list(CURVES)))
@click.option("--max-billions", default=3.0, show_default=True, help="Largest on the CPU.")
@click.option("--dtype", default="float32", show_default=True, help="Of models on the CPU.")
@click.option("--out", default="cost-curves.jsonl", show_default=True, help="Kept results.")
@click.option("--plots", default="docs", show_default=True, help="Folder of the PNG files.")
@click.option("--quick", is_flag=True, help="Two points a curve on a tiny model, to try this out.")
@click.option("--seed", default=0, show_default=True)
def main(
    names: tuple[str, ...],
    max_billions: float,
    dtype: str,
    out: str,
    plots: str,
    quick: bool,
    seed: int,
) -> None:
    """Print the tables of the cost curves, and plot them."""
    say(f"{conditions()}; results are kept in {out}")
    base = replace(QUICK if quick else Conditions(), dtype=dtype, seed=seed)
    shown: list[tuple[str, Series]] = []
    with tempfile.TemporaryDirectory(prefix="pho-") as folder:
        bench = _Bench(KeptResults(Path(out)), Path(folder))
        for name in names or _possible(quick):
            curve = CURVES[name]
            if curve.fixed.get("device") == "cuda":
                say(f"{name}: on {_require_card()}")
            points = _points(curve, base, QUICK_VALUES[name] if quick else (), max_billions)
            series = [_series(bench, curve, task, points) for task in curve.tasks]
            for one in series:
                _show(name, one)
            _plot(series, Path(plots) / f"cost-{name}.png")
            shown += [(name, one) for one in series]
    _show_growth(shown)


def _possible(quick: bool) -> list[str]:
    """The curves that are measured if none is named: those on the GPU only where there is one."""
    import torch

    with_card = torch.cuda.is_available() and not quick
    return [name for name, c in CURVES.items() if with_card or c.fixed.get("device") != "cuda"]


def _require_card() -> str:
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError(
            "--curve models-gpu needs a CUDA device, and torch sees none. Leave it out, or run it "
            "on a machine with one and a CUDA build of torch."
        )
    return card()


def _points(
    curve: Curve, base: Conditions, quick_values: tuple[Any, ...], max_billions: float
) -> list[Conditions]:
    values = quick_values or curve.values
    if curve.field == "size" and not quick_values:
        limit = 1e3 if "device" in curve.fixed else max_billions
        values = tuple(v for v in values if float(v) <= limit)
        if not values:
            raise click.UsageError(
                f"--max-billions {max_billions:g} leaves no model of {', '.join(curve.values)}."
            )
    return [replace(base, **{**curve.fixed, curve.field: value}) for value in values]


class _Bench:
    """Measures points, each in a process of its own, or finds them among those that are kept."""

    def __init__(self, kept: KeptResults, folder: Path) -> None:
        self._kept = kept
        self._folder = folder  # of the bundles of this run

    def cost(self, task: str, point: Conditions) -> dict[str, Any]:
        key = {"task": task, **asdict(point)}
        if task == "calibrate":
            del key["trials"]
        found = self._kept.find(key)
        return found if found is not None else self._measure(task, key, point)

    def _measure(self, task: str, key: dict[str, Any], point: Conditions) -> dict[str, Any]:
        made_from = [v for name, v in asdict(point).items() if name != "trials"]
        bundle = self._folder / f"{'-'.join(map(str, made_from))}.safetensors"
        if task == "search" and not bundle.is_file():
            calibration = {k: v for k, v in key.items() if k != "trials"}
            self._measure("calibrate", {**calibration, "task": "calibrate"}, point)
        cost = run_point(task, point, bundle)
        self._kept.keep(key, cost)
        return cost


def run_point(task: str, point: Conditions, bundle: Path) -> dict[str, Any]:
    """
    Measure in a process of its own.

    Raises:
        ClickException: The process failed.
    """
    title = ", ".join(f"{name} {value}" for name, value in asdict(point).items())
    say(f"{task}: {title}")
    script = Path(__file__).with_name("cost_point.py")
    command = [sys.executable, str(script), task, json.dumps(asdict(point)), str(bundle)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2] or "killed, perhaps for want of memory"
        raise click.ClickException(
            f"{task} ({title}) failed with exit code {done.returncode}: {last}. What was measured "
            "before is kept. Leave this out with --curve or --max-billions."
        )
    cost: dict[str, Any] = json.loads(done.stdout)
    return cost


def _series(bench: _Bench, curve: Curve, task: str, points: list[Conditions]) -> Series:
    return Series(
        curve=curve,
        task=task,
        first=points[0],
        at=[_position(curve, point) for point in points],
        costs=[bench.cost(task, point) for point in points],
    )


def _position(curve: Curve, point: Conditions) -> float:
    """Where a point lies on the axis of its curve."""
    if curve.field == "size":
        return _parameters(point) / 1e9
    if curve.field == "windows":
        return point.windows * point.context_length
    position: float = getattr(point, curve.field)
    return position


def _labels(series: Series) -> list[str]:
    """The positions, to be read."""
    digits = 2 if series.curve.field == "size" else 6
    return [f"{x:.{digits}g}" for x in series.at]


def _parameters(point: Conditions) -> int:
    from random_llama import SHAPES

    return SHAPES[point.size].parameters


def _size(point: Conditions) -> str:
    return f"{_parameters(point) / 1e6:.3g} million parameters"


def _show(name: str, series: Series) -> None:
    seconds, at = series.values("seconds"), series.at
    peak, growth = series.values("peak_bytes"), series.values("growth_bytes")
    columns: list[tuple[str, Iterable[str]]] = [
        (series.curve.axis, _labels(series)),
        ("wall, s", (f"{s:.2f}" for s in seconds)),
        ("CPU, s", (f"{s:.2f}" for s in series.values("cpu_seconds"))),
    ]
    if name in ("trials", "tokens"):
        columns.append((f"ms a {name[:-1]}", _ratios(seconds, at, 1e3)))
    if series.task == "search":
        held, what = series.values("bundle_bytes"), "bundle"
    else:
        held, what = series.values("model_bytes"), "model"
    columns += [
        (f"{what}, MiB", (f"{b / MIB:.1f}" for b in held)),
        ("peak, MiB", (f"{b / MIB:.0f}" for b in peak)),
        (f"peak : {what}", _ratios(peak, held)),
        ("growth, MiB", (f"{b / MIB:.0f}" for b in growth)),
        (f"growth : {what}", _ratios(growth, held)),
    ]
    grown = "its imports" if series.task == "search" else "its imports and the model"
    print_table(
        f"{name}: {series.task}",
        [title for title, _ in columns],
        list(zip(*(cells for _, cells in columns), strict=True)),
        caption=f"{series.caption()}. Peak: resident memory of the process, or memory of the GPU; "
        f"growth: the peak over the process after {grown}.",
    )


def _ratios(above: Sequence[float], below: Sequence[float], unit: float = 1) -> list[str]:
    return [f"{a / b * unit:.2f}" for a, b in zip(above, below, strict=True)]


def _show_growth(shown: list[tuple[str, Series]]) -> None:
    rows = []
    for name, series in shown:
        for title, field_name in (
            ("wall seconds", "seconds"), ("CPU seconds", "cpu_seconds"),
            ("peak memory", "peak_bytes"), ("growth of memory", "growth_bytes"),
        ):  # fmt: skip
            values = series.values(field_name)
            if len(values) < 2:
                continue
            whole, last = exponent(series.at, values), exponent(series.at[-2:], values[-2:])
            verdict = "yes" if max(whole, last) <= AT_MOST_LINEAR else "NO"
            rows.append((f"{name}: {series.task}, {title}", f"{whole:.2f}", f"{last:.2f}", verdict))
    print_table(
        "Growth: cost ~ x ^ exponent",
        ("curve", "exponent", "of the last step", "at most linear"),
        rows,
        caption="exponent: slope of the straight line through all points on logarithmic axes; the "
        f"last step, where fixed costs count least, by itself; at most linear: <= {AT_MOST_LINEAR}",
    )


def exponent(at: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the straight line through the points on logarithmic axes."""
    return float(np.polyfit(np.log(at), np.log(np.maximum(values, 1e-9)), 1)[0])


def _plot(series: list[Series], path: Path) -> None:
    """A row of panels for each task: seconds, and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    from pho_service.host.files import new_file

    figure, panels = pyplot.subplots(
        len(series), 2, figsize=(9, 3.6 * len(series) + 0.8), squeeze=False, layout="constrained"
    )
    for (left, right), one in zip(panels, series, strict=True):
        at, seconds = one.at, one.values("seconds")
        left.plot(at, seconds, "o-", label="wall")
        left.plot(at, one.values("cpu_seconds"), "s--", label="CPU, all cores")
        left.plot(at, [seconds[-1] * x / at[-1] for x in at], ":", color="grey", label="linear")
        left.set_ylabel("seconds")
        left.set_title(f"{one.task}: time", pad=26)
        held = "bundle" if one.task == "search" else "model"
        right.plot(at, one.values("peak_bytes", MIB), "o-", label="peak")
        right.plot(at, one.values("growth_bytes", MIB), "s--", label="peak over the start")
        right.plot(at, one.values(f"{held}_bytes", MIB), "^-.", label=held)
        right.set_ylabel("memory, MiB")
        right.set_title(f"{one.task}: memory", pad=26)
        for panel in (left, right):
            panel.set(xscale="log", yscale="log", xlabel=one.curve.axis)
            panel.set_xticks(at, _labels(one))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
            panel.grid(alpha=0.3)
            panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.suptitle(f"Cost against {series[0].curve.axis.partition(',')[0]}")
    figure.supxlabel("\n".join(textwrap.wrap(series[-1].caption(), 125)), fontsize=8)
    with new_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    pyplot.close(figure)
    say(f"Plot: {path}")


if __name__ == "__main__":
    main()
