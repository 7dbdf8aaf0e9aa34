"""
The form that submits a job: its fields, what was typed into them, and what the job would take.

The fields are made from those of the document, in sections; what is typed becomes a document, with
errors by field; and the same document can be submitted from a shell, by HTTP and in Python.
"""

import json
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.responses import RedirectResponse

from pho_service.api import submission
from pho_service.api.answers import PlanAnswer
from pho_service.api.operations import workers
from pho_service.api.pages import Typed as Fields
from pho_service.api.pages import draw
from pho_service.api.problems import TOO_MANY_JOBS, field_problem, sentence
from pho_service.api.service import Caller, CallerParam, Service, ServiceParam
from pho_service.api.submission import (
    Card,
    at_hand,
    checks,
    likely_card,
    shortest_window,
)
from pho_service.api.view import JobView
from pho_service.errors import told_to
from pho_service.host.access import list_roots
from pho_service.planning.costs import named_machine
from pho_service.planning.plan import format_span
from pho_service.spec.fields import FieldError
from pho_service.spec.job import JobSpec
from pho_service.spec.job_options import (
    NO_LIMIT,
    SECTIONS,
    JobField,
    entry,
    job_fields,
    minimal_document,
    number,
    remove_at,
    submit_command,
    value_at,
    within,
)
from storage.keys import QuotaExceeded
from storage.records import IdempotencyKeyReused, TooManyJobs

MORE = "more"  # takes as JSON what has no field

_NAME = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")  # of a field of the document, in a message

# Parts whose fields go by their own names where no other field has them.
_SHORT = ("calibration", "steps")


@dataclass(frozen=True, kw_only=True)
class FormField(JobField):
    @property
    def kind(self) -> str:
        """As of any field, but ``switch`` for a part that may be null."""
        if self.is_part:
            of_the_job = self.nullable and "/" not in self.path
            return "switch" if of_the_job and not self.schema.get("required") else ""
        kind = super().kind
        return "choice" if kind == "flag" and self.default is not False else kind

    @property
    def label(self) -> str:
        *above, last = self.path.split("/")
        short = len(above) == 1 and above[0] in _SHORT
        words = " ".join([*above[-1:], last][short:]).replace("_", " ").capitalize()
        return self.shown.label or words

    @property
    def unsaid(self) -> Any:
        """What an empty field stands for, or would once its part is there."""
        return self.schema.get("default", self.default)

    @property
    def choices(self) -> list[tuple[str, str]]:
        """Values and what they are called; an empty one stands for the default."""
        default = self.default
        if self.kind == "switch":
            is_on = default is not None
            return [("", "yes" if is_on else "no"), ("no", "no") if is_on else ("yes", "yes")]
        unsaid = ("", "the preset's" if within(self.path, "steps") else "default")
        if self.schema.get("type") == "boolean":
            return [unsaid, ("yes", "yes"), ("no", "no")]
        values = [(value, value) for value in self.schema["enum"] if value != default]
        return [unsaid if default is None else ("", f"{default} (default)"), *values]

    @property
    def hint(self) -> str:
        how = {
            "lines": "One a line.",
            "pairs": "NAME = VALUE, one a line.",
            "numbers": "With commas between.",
            "words": "With commas between.",
        }
        said = [str(self.schema.get("description", "")), _bounds(self.schema)]
        is_range = self.schema.get("minItems") == 2
        said.append("Two numbers, or one that fixes it." if is_range else how.get(self.kind, ""))
        if self.kind not in ("choice", "switch", "flag") and (default := self.write(self.unsaid)):
            said.append(f"By default {default}.")
        return " ".join(filter(None, said))

    def read(self, typed: str) -> Any:
        """The value that a text stands for; what is of another kind is for the document's rules."""
        if self.kind == "switch":
            return {"yes": {}, "no": None}.get(typed, typed)
        if self.kind == "flag" or self.schema.get("type") == "boolean":
            return {"on": True, "yes": True, "no": False}.get(typed, typed)
        if self.shown.kind == "minutes" and typed == NO_LIMIT:
            return None
        if self.kind in ("integer", "number"):
            return number(typed, whole=self.kind == "integer")
        if self.kind == "words":
            return [word for word in re.split(r"[,\s]+", typed) if word]
        if self.kind == "numbers":
            values = self.numbers(word for word in re.split(r"[,;:\s]+", typed) if word)
            fixed = len(values) == 1 and self.schema.get("minItems") == 2
            return values * 2 if fixed else values
        lines = [line.strip() for line in typed.split("\n") if line.strip()]
        if self.kind == "pairs":
            pairs = dict(map(_pair, lines))
            return {name: self.pair_value(item) for name, item in pairs.items()}
        return lines if self.kind == "lines" else typed

    def write(self, value: Any) -> str:
        """What to type for a value; empty for what is said by an empty field."""
        if self.kind == "switch":
            return "no" if value is None else "" if value else "yes"
        if value is None:
            return ""
        if isinstance(value, bool):
            said = "on" if self.kind == "flag" else "yes"
            return said if value else "" if self.kind == "flag" else "no"
        if self.kind in ("words", "numbers"):
            return ", ".join(map(str, value))
        if self.kind == "lines":
            return "\n".join(value)
        if self.kind == "pairs":
            return "\n".join(f"{name} = {item}" for name, item in value.items())
        return str(value)


@cache
def form_fields() -> dict[str, FormField]:
    """The fields of the form by their paths, in the order of the document."""
    fields = (FormField(**vars(field)) for field in job_fields().values())
    return {field.path: field for field in fields if field.kind}


def without_field() -> list[str]:
    """What a job has and the form has not, by path."""
    return [
        path for path, field in job_fields().items() if not (path in form_fields() or field.is_part)
    ]


@dataclass(frozen=True, kw_only=True)
class FormSection:
    """Fields that are folded up together."""

    title: str
    fields: Sequence[FormField]


@cache
def sections() -> tuple[FormSection, ...]:
    """All fields, each in one place: first those that are cards, then what More has."""
    fields = form_fields().values()
    ranked = sorted((f for f in fields if f.shown.rank), key=lambda f: f.shown.rank)
    folds: dict[str, list[FormField]] = {}
    for section, title in SECTIONS.items():
        for form_field in fields:
            if form_field.shown.section == section and form_field not in ranked:
                folds.setdefault(form_field.shown.fold or title, []).append(form_field)
    more = [FormSection(title=title, fields=members) for title, members in folds.items()]
    return (FormSection(title="", fields=ranked), *more)


def field_label(path: str) -> str:
    if path == MORE:
        return "As JSON"
    return form_fields()[path].label.removesuffix(" (needed)")


def _bounds(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    least = _bound("from", low) or _bound("above", above)
    most = _bound("up to", high) or _bound("below", below)
    words = ", ".join(filter(None, (least, most)))
    words = re.sub(r"^from (\S+), up to", r"\1 to", words)
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def _bound(word: str, value: float | None) -> str:
    return "" if value is None else f"{word} {value:,.10g}"


def _pair(line: str) -> tuple[str, str]:
    name, sign, value = (part.strip() for part in line.rpartition("="))
    if not sign or not name or not value:
        raise ValueError(f"{line!r} is not NAME = VALUE. Write one pair a line.")
    return name, value


Errors = dict[str, list[str]]

# What the rules of this machine look at: checked also where other fields are wrong.
_PLACES = (
    "model", "more_models", "calibration/text", "calibration/dataset", "calibration/data_file",
    "calibration/more_texts", "calibration/context_length", "confirm/text", "report/text",
    "notify",
)  # fmt: skip


def typed_as(document: Mapping[str, Any]) -> dict[str, str]:
    """What to type for the job that has this document; what is as it is by default is left out."""
    left = minimal_document(JobSpec.model_validate(document))
    typed = {}
    for path, form_field in form_fields().items():
        value = value_at(left, path, left)
        if value is left:
            continue
        text = form_field.write(value)
        if value is None and form_field.shown.kind == "minutes":
            text = NO_LIMIT
        if text and form_field.read(text) == value:
            typed[path] = text
            remove_at(left, path)
    return {**typed, **({MORE: json.dumps(left, indent=2, ensure_ascii=False)} if left else {})}


@dataclass(kw_only=True)
class Typed:
    fields: Mapping[str, str]  # What was typed, by field
    # What that is in a job's document; what cannot be read is not in it.
    document: dict[str, Any] = field(default_factory=dict)
    errors: Errors = field(default_factory=dict)  # What is wrong, by field; "" is of none
    _as_json: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, str]) -> "Typed":
        made = cls(fields=fields)
        switches = {}
        for path, form_field in form_fields().items():
            text = fields.get(path, "").strip()
            try:
                value = form_field.read(text) if text else None
            except ValueError as error:
                made.add(path, str(error))
                continue
            if form_field.kind == "switch":
                switches[path] = (text, value)
            elif text:
                _put(made.document, path, value)
        for path, (text, value) in switches.items():
            made._switch(path, text, value)
        made._read_json(fields.get(MORE, ""))
        return made

    def add(self, name: str, detail: str) -> None:
        """Note an error; the same one is said once."""
        said = self.errors.setdefault(name, [])
        if detail not in said:
            said.append(detail)

    def add_at(self, pointer: str, detail: str) -> None:
        """Note an error at a place in the document, at the field that stands for it."""
        path = "/".join(
            part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]
        )
        nothing = object()
        if not path:
            self.add("", detail)
        elif value_at(self._as_json, path, nothing) is not nothing:
            self.add(MORE, f"{pointer}: {detail}")
        elif above := [outer for outer in form_fields() if within(path, outer)]:
            self.add(above[-1], detail)
        elif below := [inner for inner in form_fields() if within(inner, path)]:
            typed = [inner for inner in below if self.fields.get(inner, "").strip()]
            self.add((typed or below)[0], detail)
        else:
            self.add(MORE, f"{pointer}: {detail}")

    def spec(self) -> JobSpec | None:
        """The job, if the document is one; its rules that are broken are noted."""
        try:
            return JobSpec.model_validate(self.document)
        except ValidationError as error:
            for violation in error.errors():
                fault = field_problem({**violation, "loc": ("body", *violation["loc"])}, JobSpec)
                self.add_at(fault["pointer"], _rule_in_words(fault["detail"]))
            return None

    def places(self) -> JobSpec | None:
        """A job with the models and texts of this one, as far as these can be read."""
        places: dict[str, Any] = {"model": "org/model", "pattern": "0.5"}
        for path in _PLACES:
            value = value_at(self.document, path)
            if value is not None and path not in self.errors:
                _put(places, path, value)
        for document in (places, {"model": places["model"], "pattern": "0.5"}):
            try:
                return JobSpec.model_validate(document)
            except ValidationError:
                continue
        return None

    @property
    def in_order(self) -> Errors:
        order = ["", *(field.path for section in sections() for field in section.fields), MORE]
        return {name: self.errors[name] for name in order if name in self.errors}

    def _switch(self, path: str, text: str, value: Any) -> None:
        """Put in a part that is there or null."""
        if text == "no" and path in self.document:
            typed = next(
                inner for inner in form_fields() if self.fields.get(inner) and within(inner, path)
                and inner != path
            )  # fmt: skip
            off = form_fields()[path].label
            self.add(typed, f"{off!r} says no. Say yes there, or leave this empty.")
        elif text == "no" and form_fields()[path].default is not None:
            self.document[path] = None
        elif text and text != "no":
            self.document.setdefault(path, value)

    def _read_json(self, text: str) -> None:
        """Put in what was given as JSON, unless it was typed above, too."""
        if not text.strip():
            return
        try:
            more = json.loads(text)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            self.add(MORE, f"This is not JSON: {error.msg} in {where}.")
            return
        except (ValueError, RecursionError):
            self.add(MORE, "This cannot be read as JSON.")
            return
        if not isinstance(more, dict):
            self.add(MORE, 'This is not a JSON object. Write, for example, {"trials": 100}.')
            return
        twice = [*_merge(self.document, more, "")]
        for pointer in twice:
            self.add(MORE, f"{pointer}: is given above, too. Give it in one of the two places.")
        self._as_json = more


def _rule_in_words(rule: str) -> str:
    """A rule as a sentence of the page."""
    rule = rule.replace("Field required", "This is needed")
    labels = {path.rpartition("/")[2]: f.label for path, f in form_fields().items()}
    named = _NAME.sub(lambda name: f"“{labels[name[0]]}”" if name[0] in labels else name[0], rule)
    return sentence(f"{named.rstrip('.')}.")


def _put(document: dict[str, Any], path: str, value: Any) -> None:
    *parts, last = path.split("/")
    for part in parts:
        document = document.setdefault(part, {})
    document[last] = value


def _merge(document: dict[str, Any], more: Mapping[str, Any], above: str) -> Iterable[str]:
    """Put in what is not there; gives pointers to what is."""
    for name, value in more.items():
        pointer = f"{above}/{name.replace('~', '~0').replace('/', '~1')}"
        old = document.get(name)
        if name not in document:
            document[name] = deepcopy(value)
        elif isinstance(old, dict) and isinstance(value, dict):
            yield from _merge(old, value, pointer)
        else:
            yield pointer


_END = "END"  # of the document; no line of JSON is this word


def equivalents(spec: JobSpec, url: str, *, with_key: bool) -> list[tuple[str, str]]:
    """What submits a job, by its title; no key is in it."""
    document = minimal_document(spec)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    at = ["--url", url]
    command = submit_command(document, *at)
    if command is None:  # no options say it
        command = f"{shlex.join(['pho', 'submit', *at])} --job - <<'{_END}'\n{text}\n{_END}"
    key = ['  -H "Authorization: Bearer $PHO_API_KEY" \\'] if with_key else []
    curl = [
        f"curl -sS {shlex.quote(f'{url}/v1/jobs')} \\",
        *key,
        "  -H 'Content-Type: application/json' \\",
        f"  -d {shlex.quote(text)}",
    ]
    python = [
        "from pho_service import Client",
        "",
        f"document = {_literal(document)}",
        f"with Client({url!r}) as client:",
        "    job = client.submit(document)",
        "    print(job.id)",
    ]
    return [("curl", "\n".join(curl)), ("pho submit", command), ("Python", "\n".join(python))]


def _literal(value: Any, above: str = "") -> str:
    """A value as Python, each field of an object in a line of its own."""
    if not isinstance(value, dict) or not value:
        return repr(value)
    inner = f"{above}    "
    lines = [f"{inner}{name!r}: {_literal(item, inner)},\n" for name, item in value.items()]
    return f"{{\n{''.join(lines)}{above}}}"


router = APIRouter(include_in_schema=False)

SCRIPT = "form.js"
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8", "structured:20%", "bytes:95MB", "faster:1.2x")
MOST_UPLOADS = 100  # uploaded texts that are offered, the newest
CARDS = get_args(Card)
_CONTEXT = "calibration/context_length"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,64}")


@dataclass(kw_only=True)
class Filled:
    """A form that was filled in, as far as a job can be made of it."""

    typed: Typed  # What was typed
    spec: JobSpec | None  # The job; None if the document is not one
    # Defaults that follow from the model, by field.
    fitted: dict[str, str] = field(default_factory=dict)
    # The job, or one with its places as far as these can be read; None without a model.
    named: JobSpec | None = None
    doubts: Sequence[str] = ()  # What it names that may not be there

    @classmethod
    def of(cls, fields: Mapping[str, str], service: Service, caller: Caller) -> "Filled":
        """Read a form, and note all that is wrong in it."""
        typed = Typed.of(fields)
        fitted = _fit(typed, service)
        spec = typed.spec()
        checked = spec or typed.places()
        for check in () if checked is None else checks(checked, service, caller):
            try:
                check()
            except FieldError as error:
                if spec is not None or any(within(error.pointer[1:], place) for place in _PLACES):
                    typed.add_at(error.pointer, str(error))
        named = checked if typed.document.get("model") else None
        return cls(typed=typed, spec=spec, fitted=fitted, named=named)

    @property
    def is_right(self) -> bool:
        return self.spec is not None and not self.typed.errors


@dataclass(kw_only=True)
class Beside:
    """Parts of the page beside the form."""

    card: str  # That the plan is for
    plan: PlanAnswer | None = None  # What the job would take
    no_plan: str = ""  # Why there is none
    commands: list[tuple[str, str]] = field(default_factory=list)  # What submits the same, by title


@router.api_route("/new", methods=["GET", "HEAD"])
def new(
    request: Request,
    service: ServiceParam,
    caller: CallerParam,
    job: UUID | None = None,
    fork: UUID | None = None,
) -> Response:
    """Show the form, empty, as another job was submitted, or as a fork of that one is."""
    if (like := fork or job) is None:
        return _page(request, service, caller, Filled(typed=Typed(fields={}), spec=None))
    view = JobView(service.jobs.get(like, visible_to=caller.visible_to))
    view.check_search()
    changes = {"fork_of": None} if fork is None else {"fork_of": str(fork), "warm_start": None}
    filled = Filled.of(typed_as({**view.record.spec, **changes}), service, caller)
    return _page(request, service, caller, filled, quiet=True)


@router.post("/new")
def submit(
    request: Request, fields: Fields, service: ServiceParam, caller: CallerParam
) -> Response:
    """Submit a job as ``POST /v1/jobs`` does, or show the form again with what is wrong."""
    filled = Filled.of(fields, service, caller)
    if filled.spec is None or not filled.is_right:
        return _page(request, service, caller, filled, status=422)
    try:
        job = submission.take(filled.spec, service, caller, _token(fields))
    except FieldError as error:
        filled.typed.add_at(error.pointer, str(error))
        return _page(request, service, caller, filled, status=422)
    except IdempotencyKeyReused:
        fault = (
            "This form has made a job already, of other values. Submit it again for another job."
        )
        filled.typed.add("", fault)
        return _page(request, service, caller, filled, status=422, token=_new_token())
    except (TooManyJobs, QuotaExceeded) as error:
        fault = TOO_MANY_JOBS[error.which] if isinstance(error, TooManyJobs) else str(error)
        filled.typed.add("", sentence(fault))
        return _page(request, service, caller, filled, status=429)
    return RedirectResponse(f"/jobs/{job.id}", 303)


@router.post("/new/check")
async def check(
    request: Request, fields: Fields, service: ServiceParam, caller: CallerParam
) -> Response:
    """
    Show the form again with what is wrong, or with what the job would take; submit nothing.

    A script that asks while somebody types says ``quiet``: then errors are not told yet, and the
    hub is not asked for a model's configuration.
    """
    return await service.planning.run(_checked, request, fields, service, caller)


def _checked(
    request: Request, fields: Mapping[str, str], service: Service, caller: Caller
) -> Response:
    filled = Filled.of(fields, service, caller)
    if filled.named is not None:
        filled.doubts = [*submission.doubts(filled.named, service.access)]
    quiet = "quiet" in fields
    wrong = not filled.is_right and not quiet
    status = 422 if wrong else 200
    return _page(
        request, service, caller, filled, status=status, quiet=quiet, may_ask_hub=True,
        heading="The job cannot be submitted yet",
    )  # fmt: skip


def _page(
    request: Request,
    service: Service,
    caller: Caller,
    filled: Filled,
    *,
    status: int = 200,
    token: str | None = None,
    quiet: bool = False,
    may_ask_hub: bool = False,
    heading: str = "The job was not submitted",
) -> Response:
    listing = list_roots(service.access.model_roots, service.access.text_roots)
    return draw(
        "new.html",
        status=status,
        script=SCRIPT,
        caller=caller,
        sections=sections(),
        label=field_label,
        hint_of_json="A JSON object, or nothing. All of a job can be given here instead of above; "
        f"only here: {', '.join(without_field())}.",
        more=MORE,
        typed=filled.typed.fields,
        fitted=filled.fitted,
        errors={} if quiet else filled.typed.in_order,
        heading=heading,
        doubts=filled.doubts,
        token=token or _token(filled.typed.fields),
        picks={"models": listing.models, "texts": listing.texts, "patterns": PATTERNS},
        uploads=service.texts.page(owner_id=caller.key_id, limit=MOST_UPLOADS),
        most_bytes=service.settings.max_upload_bytes,
        all_listed=listing.is_whole,
        beside=_beside(request, service, caller, filled, may_ask_hub=may_ask_hub and not quiet),
        machines=CARDS,
        span=format_span,
    )


def _beside(
    request: Request, service: Service, caller: Caller, filled: Filled, *, may_ask_hub: bool
) -> Beside:
    card = filled.typed.fields.get("card", "")
    if card not in CARDS:
        card = likely_card(workers(service, caller).workers)
    if filled.spec is None or not filled.is_right:
        no_plan = "Once a model and a pattern are given and nothing is wrong, this says how much "
        return Beside(card=card, no_plan=f"{no_plan}time and memory the job would take.")
    url = str(request.base_url).rstrip("/")
    commands = equivalents(filled.spec, url, with_key=caller.key_id is not None)
    beside = Beside(card=card, commands=commands)
    place = None if may_ask_hub else at_hand(filled.spec, service)
    if place is None and not may_ask_hub:
        beside.no_plan = "“Check and plan” reads the configuration of the model, and says what the "
        beside.no_plan += "job would take."
        return beside
    try:
        with told_to(_label):
            plan = service.plan(filled.spec, named_machine(card), place)
    except FieldError as error:
        beside.no_plan = f"No plan can be made. {error}"
        return beside
    beside.plan = PlanAnswer.model_validate(plan.to_dict())
    return beside


def _fit(typed: Typed, service: Service) -> dict[str, str]:
    """Put in the defaults that follow from the models, where nothing is typed."""
    calibration = typed.document.get("calibration", {})
    if not isinstance(calibration, dict) or "context_length" in calibration:
        return {}
    more, revision = typed.document.get("more_models"), typed.document.get("revision")
    names = [typed.document.get("model"), *(more if isinstance(more, list) else ())]
    shortest = shortest_window(
        [name for name in names if isinstance(name, str)],
        service.access,
        revision if isinstance(revision, str) else None,
    )
    if shortest is None or shortest >= form_fields()[_CONTEXT].default:
        return {}
    typed.document["calibration"] = {**calibration, "context_length": shortest}
    return {_CONTEXT: str(shortest)}


def _label(path: str, value: object = None) -> str:
    """What messages call a field: its label in the form."""
    if path not in form_fields():
        return entry(path, value)
    return field_label(path) + ("" if value in (None, True) else f": {value}")


def _new_token() -> str:
    """For a form: however often it is sent, it makes one job."""
    return secrets.token_urlsafe(16)


def _token(fields: Mapping[str, str]) -> str:
    """The token that a form came with; another one if that is none of ours."""
    token = fields.get("token", "")
    return token if _TOKEN.fullmatch(token) else _new_token()
