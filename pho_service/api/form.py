"""
The form that submits a job: from what was typed to a document, and from its errors to the fields.
"""

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pho_service.api.problems import field_problem
from pho_service.spec.fields import CalibrationSpec, FieldError
from pho_service.spec.job import JobSpec
from pho_service.spec.presets import PRESETS

# What can be typed, in the order of the page; ``more`` takes the other fields of a job as JSON.
LABELS = {
    "model": "Model",
    "pattern": "Pattern",
    "preset": "Preset",
    "calibration": "Calibration text",
    "trials": "Trials",
    "seed": "Seed",
    "more": "All other fields",
}
OPTIONS = {"pattern": ("0.5", "0.6", "2:4", "4:8"), "preset": PRESETS}
DEFAULTS = {
    **dict.fromkeys(LABELS, ""),
    **{name: str(JobSpec.model_fields[name].default) for name in ("preset", "trials", "seed")},
}
_OWN_FIELDS = ("model", "pattern", "preset", "trials", "seed")  # of a job, typed as they are
_TEXT_FILES = (".txt", ".jsonl", ".parquet")
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,64}")


def hints() -> dict[str, str]:
    """What is said beside the fields."""
    shown = (*_OWN_FIELDS, "calibration", "preset_meaning")
    others = [name for name in JobSpec.model_fields if name not in shown]
    calibration = CalibrationSpec.model_fields
    return {
        "model": str(JobSpec.model_fields["model"].description),
        "pattern": str(JobSpec.model_fields["pattern"].description),
        "preset": "How far to go: best takes minutes, score is a cheap look.",
        "calibration": "A .txt, .jsonl or .parquet file, or a data set: an id on the hub or a "
        "folder. C4 if it is empty.",
        "trials": str(JobSpec.model_fields["trials"].description),
        "seed": "The same seed gives the same result.",
        "more": 'A JSON object, or nothing: {"scope": "global", "calibration": {"samples": 32}}. '
        f"A job also has {', '.join(others)}; calibration also "
        f"has {', '.join(n for n in calibration if n not in ('text', 'dataset'))}.",
    }


def typed_as(document: Mapping[str, Any]) -> dict[str, str]:
    """
    What to type for the job that has this document; what is as it is by default is left out.

    Args:
        document: Document of a search, as it is stored.
    """
    own = {name: document[name] for name in _OWN_FIELDS}
    several = {name: document[name] for name in ("patterns", "target") if name in document}
    default = JobSpec.model_validate({**own, **several}).model_dump(mode="json")
    typed = {**DEFAULTS, **{n: "" if value is None else str(value) for n, value in own.items()}}
    calibration = {
        name: value
        for name, value in (document.get("calibration") or {}).items()
        if value != (default.get("calibration") or {}).get(name)
    }
    for name in ("dataset", "text"):
        source = calibration.pop(name, None)
        typed["calibration"] = source or typed["calibration"]
    more = {
        name: value
        for name, value in document.items()
        if name not in (*_OWN_FIELDS, "calibration", "preset_meaning", "preset_meanings")
        and (name in several or value != default.get(name))
    }
    if calibration:
        more["calibration"] = calibration
    return {**typed, "more": json.dumps(more, indent=2) if more else ""}


def new_token() -> str:
    """For a form: however often it is sent, it makes one job."""
    return secrets.token_urlsafe(16)


def token_of(typed: Mapping[str, str]) -> str:
    """The token that a form came with; another one if that is none of ours."""
    token = typed.get("token", "")
    return token if _TOKEN.fullmatch(token) else new_token()


class WrongForm(ValueError):
    """
    What was typed makes no job.

    Attributes:
        errors: By field; those of no field have the key "".
    """

    def __init__(self, errors: dict[str, list[str]]) -> None:
        super().__init__(str(errors))
        self.errors = errors

    @classmethod
    def of(cls, error: FieldError) -> "WrongForm":
        """A field breaks a rule of this machine."""
        field, detail = _placed(error.pointer, str(error))
        return cls({field: [detail]})


def read_spec(typed: Mapping[str, str]) -> JobSpec:
    """
    The document of a job.

    Args:
        typed: By field.

    Raises:
        WrongForm: It breaks a rule; names the fields.
    """
    document = _document(typed)
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        errors: dict[str, list[str]] = {}
        for each in error.errors():
            found = field_problem({**each, "loc": ("body", *each["loc"])}, JobSpec)
            field, detail = _placed(found["pointer"], found["detail"])
            errors.setdefault(field, []).append(detail)
        raise WrongForm({n: errors[n] for n in ("", *LABELS) if n in errors}) from error


def _document(typed: Mapping[str, str]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name in _OWN_FIELDS:
        value = typed.get(name, "").strip()
        if value:
            number = name in ("trials", "seed") and _INTEGER.fullmatch(value)
            document[name] = int(value) if number else value
    source = typed.get("calibration", "").strip()
    if source:
        is_file = source.lower().endswith(_TEXT_FILES)
        document["calibration"] = {"text" if is_file else "dataset": source}
    for name, value in _more(typed.get("more", "")).items():
        if name == "calibration" and isinstance(value, dict) and source:
            twice = {"text", "dataset"} & value.keys()
            document[name] |= value
        else:
            twice = {name} & document.keys()
            document[name] = value
        if twice:
            where = "/calibration" if name == "calibration" else f"/{name}"
            raise WrongForm(
                {"more": [f"{where}: is given above, too. Give it in one of the two places."]}
            )
    return document


def _more(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise WrongForm({"more": [f"This is not JSON: {error.msg} in {where}."]}) from error
    except (ValueError, RecursionError) as error:
        raise WrongForm({"more": ["This cannot be read as JSON."]}) from error
    if not isinstance(value, dict):
        raise WrongForm(
            {"more": ['This is no JSON object. Write, for example, {"scope": "global"}.']}
        )
    return value


def _placed(pointer: str, detail: str) -> tuple[str, str]:
    """The field that an error stands beside, and what is said there."""
    name = pointer.removeprefix("/")
    if name in _OWN_FIELDS:
        return name, detail
    if name in ("calibration/text", "calibration/dataset"):
        return "calibration", detail
    return ("more", f"{pointer}: {detail}") if pointer else ("", detail)
