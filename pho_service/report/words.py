"""
What was asked, in words, and the commands that ask the same again.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from pho_service.spec.fields import CalibrationSpec, ConfirmSpec
from pho_service.spec.job import JobSpec, island_seed
from pho_service.spec.transfer import TransferSpec


def search_in_words(spec: JobSpec) -> dict[str, str]:
    """What a search job asks for."""
    plan = spec.plan(0)
    seeds = [str(island_seed(spec.seed, island)) for island in range(spec.islands)]
    return {
        "model" if len(spec.models) == 1 else "models": ", ".join(spec.models),
        "pattern": _pattern(spec.pattern),
        "scope": spec.pruning().scope.value,
        "preset": spec.preset,
        "steps": str(plan.steps),
        "objective": spec.request(0).objective.label,
        "sampler": spec.sampler,
        "trials": f"{spec.trials}" + (f" on each of {spec.islands} islands" * (spec.islands > 1)),
        "seed" if len(seeds) == 1 else "seeds": ", ".join(seeds),
        "search space": _space(plan.space.to_dict()),
        "calibration": _calibration(spec.calibration),
        "confirmation": _confirmation(spec.confirm),
        **(
            {}
            if spec.warm_start is None
            else {"warm start": f"with {spec.warm_start.count} of the library"}
        ),
        **(
            {}
            if spec.validation is None
            else {"validation": f"{spec.validation.candidates} random candidates"}
        ),
    }


def search_commands(document: str = "job.json") -> list[str]:
    """How a job's document is submitted again."""
    return [
        f"# the document below, saved as {document}",
        f"pho submit --job {document} --watch",
        "pho best ID --out config.json  # the id that was printed",
    ]


def transfer_in_words(spec: TransferSpec) -> dict[str, str]:
    """What a transfer asks for."""
    report, search, calibration = spec.report, spec.search, spec.calibration
    assert calibration is not None  # the document says so
    return {
        "configuration": f"what job {spec.source} found",
        "pattern": _pattern(str(spec.configuration["pattern"])),
        "scope": str(spec.configuration["scope"]),
        "models": ", ".join(spec.models),
        "report text": "none: only proxies are compared"
        if report is None
        else report.text + ("" if report.windows is None else f", {report.windows} windows"),
        "own best": "not searched for"
        if search is None
        else f"searched for in {search.trials} trials, seed {search.seed}",
        "calibration": _calibration(calibration),
    }


def transfer_document(spec: TransferSpec) -> dict[str, Any]:
    """What was sent to ``:transfer``."""
    return spec.model_dump(mode="json", exclude={"kind", "source", "configuration"})


def transfer_commands(spec: TransferSpec) -> list[str]:
    """How the same transfer is asked for again."""
    return [
        "# the document below, saved as transfer-request.json",
        f"curl -s $PHO_API_URL/v1/jobs/{shlex.quote(spec.source)}:transfer "
        "-H 'content-type: application/json' -d @transfer-request.json",
    ]


def study_in_words(known: Mapping[str, Any]) -> dict[str, str]:
    """
    What the search asked for whose study this is.

    Args:
        known: The study's user attributes.
    """
    provenance = _dict(known.get("calibration"))
    text, settings = _dict(provenance.get("text")), _dict(provenance.get("settings"))
    asked = {
        "model": ", ".join(_models(provenance)),
        "pattern": _pattern(str(known.get("pattern", "unknown"))),
        "scope": str(known.get("scope", "unknown")),
        "objective": str(known.get("objective", "unknown")),
        "sampler": str(known.get("sampler", "unknown")),
        "seed": str(known.get("seed", "unknown")),
        "search space": _space(_dict(known.get("space"))),
        "calibration": "; ".join(
            [str(value) for value in [text.get("source")] if value]
            + [f"{_words(name)} {value}" for name, value in settings.items() if value is not None]
        ),
    }
    return {name: value for name, value in asked.items() if value}


def study_commands(known: Mapping[str, Any], url: str, trials: int) -> list[str]:
    """
    The search of a study, with all that the study says of it.

    Args:
        known: Its user attributes.
        url: Of its database, without a password.
        trials: That it has.
    """
    provenance = _dict(known.get("calibration"))
    pattern, text = str(known.get("pattern")), _dict(provenance.get("text")).get("source")
    name, _, weighting = str(known.get("objective", "")).partition("/")
    weighting, over, _ = (*weighting.split(", "), "", "")[:3]
    words = ["pho", "search", *_models(provenance)]
    words += ["--pattern", pattern]
    words += [] if ":" in pattern else ["--scope", str(known.get("scope"))]
    words += ["--objective", name] if name else []
    words += ["--weighting", weighting] if weighting else []
    words += ["--over", over.split()[0]] if over else []
    words += ["--sampler", str(known.get("sampler")), "--seed", str(known.get("seed"))]
    words += ["--trials", str(trials)]
    steps = _dict(known.get("steps"))
    for step in ("permutation", "repruning", "update"):
        words += [f"--{step}", str(steps[step])] if steps.get(step, "none") != "none" else []
    for bound, values in _dict(known.get("space")).items():
        joined = ("," if bound in ("kernel_sizes", "allocations") else ":").join(map(str, values))
        words += ["--space", f"{bound}={joined}"]
    words += ["--text", str(text)] if text else []
    return [
        "# and the options of the calibration and the confirmation, which are in the tables",
        shlex.join([*words, "--study", url]),
    ]


def _models(provenance: Mapping[str, Any]) -> list[str]:
    """The names of the models that a bundle, or several, are of."""
    model = _dict(provenance.get("model"))
    return [str(_dict(each).get("name", "unknown")) for each in model.get("models") or [model]]


def _dict(value: Any) -> dict[str, Any]:
    """A value of a study that others may have written."""
    return value if isinstance(value, dict) else {}


def _pattern(pattern: str) -> str:
    if ":" in pattern:
        kept, _, group = pattern.partition(":")
        return f"{pattern}: {kept} of every {group} weights stay"
    return f"{pattern}: the share of the weights that go"


def _space(bounds: Mapping[str, Any]) -> str:
    parts = []
    for name, values in bounds.items():
        numbers = [f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in values]
        listed = name in ("kernel_sizes", "allocations")
        fixed = len({*numbers}) == 1
        joined = numbers[0] if fixed else (", " if listed else " to ").join(numbers)
        parts.append(f"{_words(name)} {joined}")
    return "; ".join(parts)


def _calibration(calibration: CalibrationSpec) -> str:
    return (
        f"{calibration.text or calibration.dataset or 'C4'}, {calibration.samples} windows of "
        f"{calibration.context_length} tokens, seed {calibration.seed}"
    )


def _confirmation(confirm: ConfirmSpec | None) -> str:
    if confirm is None:
        return "none: the best by the objective alone"
    text = confirm.text or "what the calibration leaves of its text"
    return f"{confirm.candidates} candidates on {confirm.windows} windows of {text}"


def _words(name: str) -> str:
    return name.replace("_", " ")
