"""
A request in words, and the commands that ask the same again.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from pho_service.spec.fields import CalibrationSpec, ConfirmSpec
from pho_service.spec.job import JobSpec, island_seed
from pho_service.spec.minutes import OF_THE_TEXT
from pho_service.spec.structure import BY_SPEED, IN_BYTES, OF_FILE, is_structured
from pho_service.spec.transfer import TransferSpec


def search_in_words(spec: JobSpec) -> dict[str, str]:
    if spec.is_cut:
        return _cut_in_words(spec)
    plan = spec.plan(0)
    seeds = [str(island_seed(spec.seed, island)) for island in range(spec.islands)]
    return {
        "model" if len(spec.models) == 1 else "models": ", ".join(spec.models),
        **_patterns(spec),
        "preset": spec.preset,
        "steps": str(plan.steps),
        "objective": spec.request(0).objective.label,
        "sampler": spec.sampler,
        "trials": f"{spec.trials}" + (f" on each of {spec.islands} islands" * (spec.islands > 1)),
        "seed" if len(seeds) == 1 else "seeds": ", ".join(seeds),
        "search space": _space(plan.space.to_dict()),
        **_minutes(spec),
        "calibration": _calibration(spec.calibration, spec.free_sizes),
        "confirmation": _confirmation(spec.confirm, spec.free_sizes),
        **({} if spec.report is None else {"report": f"at most {spec.report}"}),
        **(
            {}
            if spec.warm_start is None
            else {"warm start": f"with {spec.warm_start.count} of the library"}
        ),
        **({} if spec.tasks is None else {"tasks": _tasks(spec)}),
        **_recovery(spec),
        **(
            {}
            if spec.validation is None
            else {"validation": f"{spec.validation.candidates} random candidates"}
        ),
    }


def _cut_in_words(spec: JobSpec) -> dict[str, str]:
    return {
        "model": spec.model,
        **{name: words for name, words in _patterns(spec).items() if name != "scope"},
        "splits": "all, rated by what they are estimated to cost",
        **_minutes(spec),
        "calibration": _calibration(spec.calibration, spec.free_sizes),
        "confirmation": _confirmation(spec.confirm, spec.free_sizes),
        **({} if spec.report is None else {"report": f"at most {spec.report}"}),
        **({} if spec.tasks is None else {"tasks": _tasks(spec)}),
        **_recovery(spec),
    }


def _recovery(spec: JobSpec) -> dict[str, str]:
    if spec.recovery is None:
        return {}
    settings = spec.recovery.settings()
    if spec.recovers_in_rest:
        return {"recovery": f"in what the minutes leave, training {settings.train}"}
    return {"recovery": str(settings)}


def _tasks(spec: JobSpec) -> str:
    names = ", ".join(spec.tasks or ())
    return names + (
        f" (the first {spec.tasks_limit} examples of each)" if spec.tasks_limit is not None else ""
    )


def _patterns(spec: JobSpec) -> dict[str, str]:
    """Describe how sparse the model is to be."""
    scopes = {point.scope.value: None for point in spec.points}
    scope = {"scope" if len(scopes) == 1 else "scopes": ", ".join(scopes)}
    if spec.target is not None:
        return {"target": f"the highest sparsity within {spec.target}", **scope}
    if spec.patterns is not None:
        return {"patterns": ", ".join(map(str, spec.points)), **scope}
    return {"pattern": pattern_in_words(str(spec.pattern)), **scope}


def search_commands(document: str = "job.json") -> list[str]:
    """The command that submits a job's document again."""
    return [
        f"# the document below, saved as {document}",
        f"pho submit --job {document} --watch",
        "pho best ID --out config.json  # the id that was printed",
    ]


def prune_commands(job_id: str, spec: JobSpec, *, written: bool) -> list[str]:
    """Commands that get the pruned model, which may be written already, and the configuration."""
    fetch = f"pho best {job_id} --out config.json"
    if spec.more_models:  # whose service prunes none of them
        models = [shlex.join(["pho", "prune", name, "--config", "config.json", "--out", "pruned"])
                  for name in spec.models]  # fmt: skip
        return [fetch, *models]
    return [f"pho pull {job_id}{'' if written else ' --prune'} --out pruned", fetch]


def transfer_in_words(spec: TransferSpec) -> dict[str, str]:
    report, search, calibration = spec.report, spec.search, spec.calibration
    assert calibration is not None  # the document says so
    return {
        "configuration": f"what job {spec.source} found",
        "pattern": pattern_in_words(str(spec.configuration["pattern"])),
        "scope": str(spec.configuration["scope"]),
        "models": ", ".join(spec.models),
        "report text": "none: only proxies are compared"
        if report is None
        else str(report.text or report.dataset)
        + ("" if report.windows is None else f", {report.windows} windows"),
        "own best": "not searched for"
        if search is None
        else f"searched for in {search.trials} trials, seed {search.seed}",
        "calibration": _calibration(calibration),
    }


def transfer_commands(spec: TransferSpec) -> list[str]:
    """The command that asks for the same transfer again."""
    return [
        "# the document below, saved as transfer-request.json",
        f"curl -s $PHO_API_URL/v1/jobs/{shlex.quote(spec.source)}:transfer "
        "-H 'content-type: application/json' -d @transfer-request.json",
    ]


def study_in_words(record: Mapping[str, Any]) -> dict[str, str]:
    """The request that a study's record belongs to, in words."""
    provenance = _dict(record.get("calibration"))
    text, settings = _dict(provenance.get("text")), _dict(provenance.get("settings"))
    parts = {
        "model": ", ".join(_models(provenance)),
        "pattern": pattern_in_words(str(record.get("pattern", "unknown"))),
        "scope": str(record.get("scope", "unknown")),
        "objective": str(record.get("objective", "unknown")),
        "sampler": str(record.get("sampler", "unknown")),
        "seed": str(record.get("seed", "unknown")),
        "search space": _space(_dict(record.get("space"))),
        "calibration": "; ".join(
            [str(value) for value in [text.get("source")] if value]
            + [f"{_words(name)} {value}" for name, value in settings.items() if value is not None]
        ),
    }
    return {name: value for name, value in parts.items() if value}


def study_document(record: Mapping[str, Any], trials: int) -> dict[str, Any]:
    """The document of the search whose study has this record, and so many trials."""
    # Those of Python have no document: what they say of the search is put together, all but how it
    # was confirmed.
    if isinstance(record.get("document"), dict):
        return dict(record["document"])
    provenance = _dict(record.get("calibration"))
    pattern = str(record.get("pattern"))
    name, _, weighting = str(record.get("objective", "")).partition("/")
    weighting, over, _ = (*weighting.split(", "), "", "")[:3]
    objective = {"name": name, "weighting": weighting, "over": over.partition(" ")[0]}
    model, *more_models = _models(provenance)
    settings, text = _dict(provenance.get("settings")), _dict(provenance.get("text"))
    return {
        "model": model,
        "more_models": more_models,
        "pattern": pattern,
        "scope": None if ":" in pattern else record.get("scope"),
        "objective": {field: value for field, value in objective.items() if value},
        "preset": "score",  # and all that differs from it
        "steps": _dict(record.get("steps")),
        "search_space": _dict(record.get("space")),
        "sampler": record.get("sampler"),
        "seed": record.get("seed"),
        "trials": trials,
        "calibration": {**settings, **_texts(text)},
        **({"confirm": None} if more_models else {}),
    }


# Tells a file of a data set from a configuration.
_FILE = re.compile(r"[/*]|\.(jsonl?|ndjson|parquet|txt|[ct]sv|gz|bz2|xz|zst)$")


def _texts(text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record's text, or of its several texts."""
    parts = [_dict(part) for part in text.get("texts") or [text]]
    first, *more = [_source(str(part.get("source", ""))) for part in parts]
    if not more:
        return first
    shares = [part.get("share") for part in parts]
    return {**first, "more_texts": [m.get("text") or m.get("dataset") for m in more],
            "shares": shares}  # fmt: skip


def _source(text: str) -> dict[str, Any]:
    """The fields of a text, from what it is called; nothing if it is not known."""
    if text.endswith((".txt", ".jsonl", ".parquet")):
        return {"text": text, "dataset": None, "data_file": None}
    dataset, *between, split = text.split(" ")  # between: its configuration, a file of it, or none
    config = [part for part in between if not _FILE.search(part)]
    file = [part for part in between if _FILE.search(part)]
    if dataset == "" or len(config) > 1 or len(file) > 1:
        return {}
    return {
        "dataset": dataset,
        "dataset_config": config[0] if config else None,
        "data_file": file[0] if file else None,
        "split": split,
    }


def _models(provenance: Mapping[str, Any]) -> list[str]:
    """The names of the models that a bundle, or several, are of."""
    model = _dict(provenance.get("model"))
    return [str(_dict(part).get("name", "unknown")) for part in model.get("models") or [model]]


def _dict(value: Any) -> dict[str, Any]:
    """A value of a study that others may have written."""
    return value if isinstance(value, dict) else {}


def pattern_in_words(pattern: str) -> str:
    """A pattern, and what it says."""
    if is_structured(pattern):
        kind, _, share = pattern.partition(":")
        if pattern.startswith((IN_BYTES, BY_SPEED)):
            times, *where = share.split(":")
            what = f"it writes {times} times as fast" + f" in {' '.join(where)}" * bool(where)
            if pattern.startswith(IN_BYTES):
                what = f"a GGUF file of it has {share} at most"
            return f"{pattern}: so many neurons, heads and blocks are cut that {what}"
        of = "model's file" if f"{kind}:" == OF_FILE else "blocks' weights"
        return f"{pattern}: neurons, heads and blocks with {share} of the {of} are cut"
    if ":" in pattern:
        keep, _, group = pattern.partition(":")
        return f"{pattern}: {keep} of every {group} weights are kept"
    try:
        return f"{pattern}: {100 * float(pattern):.4g} % of the weights are removed"
    except ValueError:  # a study of others
        return pattern


def _space(bounds: Mapping[str, Any]) -> str:
    parts = []
    for name, values in bounds.items():
        numbers = [f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in values]
        listed = name in ("kernel_sizes", "allocations")
        fixed = len({*numbers}) == 1
        joined = numbers[0] if fixed else (", " if listed else " to ").join(numbers)
        parts.append(f"{_words(name)} {joined}")
    return "; ".join(parts)


def _minutes(spec: JobSpec) -> dict[str, str]:
    """The time of a job, if it has one."""
    if spec.minutes is None:
        return {}
    return {"minutes": f"{spec.minutes:g}"}


_AS_FIT = "as many as fit into the minutes"


def _calibration(calibration: CalibrationSpec, free: Sequence[str] = ()) -> str:
    windows = f"{calibration.samples} windows of {calibration.context_length} tokens"
    if {*free} & {*OF_THE_TEXT}:
        windows = f"windows, {_AS_FIT}"
    return f"{calibration.named}, {windows}, seed {calibration.seed}"


def _confirmation(confirm: ConfirmSpec | None, free: Sequence[str] = ()) -> str:
    if confirm is None:
        return "none: the best by the objective alone"
    text = confirm.text or "what the calibration leaves of its text"
    if any(path.startswith("confirm/") for path in free):
        return f"finalists, {_AS_FIT}, on windows of {text}"
    return f"{confirm.finalists} finalists on {confirm.windows} windows of {text}"


def _words(name: str) -> str:
    return name.replace("_", " ")
