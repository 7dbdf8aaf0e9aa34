"""
The options of a verb made from fields: of a job's document, and of what the verb alone is asked.
"""

import inspect
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pho_service.cli.terminal import fail, say
from pho_service.errors import InvalidInput
from pho_service.spec.curve import Target
from pho_service.spec.document import MACHINE
from pho_service.spec.job_options import (
    SECTIONS,
    Field,
    document_fields,
    option_fields,
    value_at,
    within,
)
from pho_service.spec.minutes import OF_THE_TEXT

if TYPE_CHECKING:
    from pydantic import ValidationError

    from pho_service.spec.configuration import Configuration
    from pho_service.spec.fields import CalibrationSpec
    from pho_service.spec.job import JobSpec


T = TypeVar("T")

# User attributes of a study: the job that was asked for, and the names that it begins with.
DOCUMENT, WARM = "document", "warm_start_names"

# The sections of a verb's --help: what an option is about.
TITLES = (*SECTIONS, MACHINE, "Output")

# What people use of a verb: the first eight that it has, after those that it needs.
_USED = (
    "--pattern", "--patterns", "--config", "--method", "--text", "--confirm-text", "--report-text",
    "--card", "--preset", "--check", "--minutes", "--train", "--out", "--bytes", "--type",
    "--samples", "--context-length", "--trials", "--space", "--job", "--watch", "--tasks",
    "--device",
)  # fmt: skip
_MOST = 8
_FEW = 12  # options that --help shows at once
_ALWAYS = ("--json", "--help", "--help-all")
WHOLE_HELP = "pho.help-all"  # in a context's meta: whether every option is shown


def _show_all(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        ctx.meta[WHOLE_HELP] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


_AGAIN = "may be given several times."

# Rules of pydantic in the words of the other messages.
_RULES = {
    "greater_than_equal": "is below {ge}",
    "greater_than": "is not above {gt}",
    "less_than_equal": "is above {le}",
    "less_than": "is not below {lt}",
}


@dataclass(frozen=True, kw_only=True)
class Given:
    """The options of a document that were given."""

    fields: Mapping[str, Field]  # Those of the document, by their paths
    said: Mapping[str, Any]  # What they say, by the paths of their fields
    names: Mapping[str, str]  # What they are called, by the same
    models: Sequence[str] = ()  # What the verb was given

    @cached_property
    def longest(self) -> int | None:
        """The tokens that all models read, if they are few and no length is given; it is told."""
        from pho_service.planning.shapes import longest_of
        from pho_service.spec.calibration import CalibrationSettings

        if "calibration/context_length" in self.said:
            return None
        read = [(longest_of(name, self("revision")), name) for name in self.models]
        length, name = min((pair for pair in read if pair[0]), default=(None, ""))
        if length is None or length >= CalibrationSettings.context_length:
            return None
        say(f"{name} reads {length} tokens: that is the context length.")
        return length

    def document(self, document: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The document that has what was given, put into another one."""
        made: dict[str, Any] = deepcopy(dict(document or {}))
        for path, said in self.said.items():
            name = self.names[path]
            *folders, last = path.split("/")
            place = made
            value: Any = self.fields[path].value(said, name)
            if path == "warm_start/found":  # files, which are read when the pattern is known
                value, folders, last = {}, [], "warm_start"
            for folder in [*folders, *([last] if isinstance(value, dict) else [])]:
                place = place.setdefault(folder, {})
                if not isinstance(place, dict):
                    raise InvalidInput(
                        f"{name} has no place in the job document: its {folder!r} is not an "
                        "object. Leave one of them out."
                    )
            place.update(value if isinstance(value, dict) else {last: value})
        return made

    def __call__(self, path: str) -> Any:
        """What was given for a field, or its default."""
        return self.said.get(path, self.fields[path].default)

    def job(self, document: Mapping[str, Any]) -> "JobSpec":
        from pho_service.spec.job import JobSpec

        if "minutes" not in self.fields:  # this verb keeps to none
            document = {"minutes": None, **document}
        spec = self.read(JobSpec, document)
        return spec.model_copy(update={"calibration": spec.calibration.fitted(self.longest)})

    def calibration(self, like: "Iterable[Configuration]" = ()) -> "CalibrationSpec":
        """
        How the verb calibrates; if no size is given, with as many windows as the first of some
        configurations was found on.
        """
        from pho_service.spec.fields import CalibrationSpec

        asked = self.part("calibration", CalibrationSpec)
        names = [path.rpartition("/")[2] for path in OF_THE_TEXT]
        found = (configuration.calibration.get("settings", {}) for configuration in like)
        sizes = next((known for known in found if {*names} <= known.keys()), None)
        if sizes is None or any(path in self.said for path in OF_THE_TEXT):
            return asked.fitted(self.longest)
        samples, length = (sizes[name] for name in names)
        length = min(length, self.longest or length)
        say(f"Calibrating as it was found: on {samples} windows of {length} tokens.")
        return asked.model_copy(update=dict(zip(names, (samples, length), strict=True)))

    def part(self, path: str, kind: type[T]) -> T:
        """A part of the document, by itself."""
        return self.read(kind, value_at(self.document(), path, {}), f"{path}/")

    def read(self, kind: type[T], document: object, above: str = "") -> T:
        """A document or a part of one; what breaks a rule is called by its option."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(kind).validate_python(document)
        except ValidationError as error:
            raise self._refused(error, above) from error

    def _refused(self, error: "ValidationError", above: str) -> InvalidInput:
        """What pydantic says, with the options' names instead of the fields'."""
        sentences = []
        for problem in error.errors():
            path = above + "/".join(map(str, problem["loc"]))
            message = str(problem["msg"]).removeprefix("Value error, ").removesuffix(".")
            ours = isinstance(problem.get("ctx", {}).get("error"), InvalidInput)
            thing = self._thing(path, problem["input"], named=ours)
            # The plan of the whole search is checked with the number of trials.
            if path == "trials" and ours and not message.startswith("trials"):
                thing = ""
            if thing and problem["type"] in _RULES:
                limits = {k: int(v) if v == int(v) else v for k, v in problem["ctx"].items()}
                rule = _RULES[problem["type"]].format(**limits)
                sentences.append(f"{thing.removesuffix(': ')} {rule}")
            else:
                sentences.append(thing + message.replace("Input should", "it should"))
        return InvalidInput("; ".join(dict.fromkeys(sentences)) + ".")

    def _thing(self, path: str, value: object, *, named: bool) -> str:
        """What a message is about: an option with its value, or else a field."""
        paths = [p for p in self.said if within(path, p) or within(p, path)] if path else []
        paths.sort(key=lambda p: p != path)
        if paths:
            entry = self.said[paths[0]]
            words = entry if isinstance(entry, tuple) else () if entry is True else (entry,)
            return " ".join((self.names[paths[0]], *map(str, words))) + ": "
        if path.partition("/")[0] in ("model", "more_models"):
            return "MODEL: "
        return "" if named or not path else f"/{path} {reprlib.repr(value)}: "


class DocumentCommand(click.Command):
    """
    A verb with options for fields, which are made when they are needed.

    Those of a document, a job's mostly, become the argument ``given``; those of the dataclass
    ``ask``, which says what the verb alone is asked, become one of it. --help begins with what is
    used most, and --help-all has sections.
    """

    def __init__(
        self,
        *args: Any,
        fields: Sequence[str] = (),
        source: Callable[[], Mapping[str, Field]] = document_fields,
        ask: type | None = None,
        names: Mapping[str, str] | None = None,
        required: Sequence[str] = (),
        needed: str = "",
        of_a_service: bool = True,
        hidden: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        super().__init__(*args, **attributes)
        self._needed = needed  # What there may be instead of a pattern
        self._paths, self._renamed, self._required = fields, names or {}, required
        self._source, self._ask = source, ask
        self._of_a_service, self._hidden = of_a_service, hidden  # sections that help leaves out
        # Fields that an option is about when it is given again, by its parameter.
        self._again: dict[str, Field] = {}

    @cached_property
    def _ask_fields(self) -> Mapping[str, Field]:
        return {} if self._ask is None else option_fields(self._ask)

    @cached_property
    def _document_fields(self) -> Mapping[str, Field]:
        return self._source() if self._paths else {}

    @cached_property
    def fields(self) -> list[Field]:
        """Those of the document that the verb has."""
        return [
            field
            for path, field in self._document_fields.items()
            if any(within(path, part) for part in self._paths)
            and (self._of_a_service or not field.shown.service)
        ]

    @cached_property
    def _options(self) -> dict[str, tuple[Field, click.Option]]:
        options: dict[str, tuple[Field, click.Option]] = {}
        for field in [*self.fields, *self._ask_fields.values()]:
            name = self._renamed.get(field.path, field.name)
            option = field.option(name, required=field.path in self._required)
            option.hidden = field.shown.section in self._hidden
            if field.path == "pattern" and self._needed:
                option.help = f"{option.help}  [required unless {self._needed}]"
            if same := [row for row in options.values() if name in row[1].opts]:
                first_field, first = same[0]  # given again, it is this field's
                option.name, option.help = first.name, f"{str(first.help)[:-1]}; {_AGAIN}"
                options[str(first.name)] = (first_field, option)
                self._again[str(first.name)] = field
                continue
            options[str(option.name)] = (field, option)
        return options

    @property
    def names(self) -> dict[str, str]:
        """The options of this verb by the paths of their fields."""
        return {field.path: option.opts[0] for field, option in self._options.values()}

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All of them, those of the document first."""
        *params, shown = super().get_params(ctx)  # --help is the last
        arguments = [param for param in params if isinstance(param, click.Argument)]
        options = [option for _, option in self._options.values()]
        options += [param for param in params if isinstance(param, click.Option)]
        more = click.Option(
            ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
            help="Show all options, in sections.", hidden=len(options) <= _FEW,
        )  # fmt: skip
        return [*arguments, *options, more, shown]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments; what is of fields becomes the arguments ``given`` and ``ask``."""
        rest = super().parse_args(ctx, args)
        said: dict[str, dict[str, Any]] = {"given": {}, "ask": {}}
        names: dict[str, str] = {}
        for parameter, (field, option) in self._options.items():
            value = ctx.params.pop(parameter, None)
            is_asked = self._ask_fields.get(field.path) is field
            values = said["ask" if is_asked else "given"]
            if value and (again := self._again.get(parameter)):
                value, *more = value
                values |= {again.path: tuple(more)} if more else {}
                names[again.path] = option.opts[0]
            if value is not None and value != () and value is not False:
                values[field.path], names[field.path] = value, option.opts[0]
        models = ctx.params.get("models") or (ctx.params.get("model"),)
        for argument, fields, wanted in (
            ("given", self._document_fields, self._paths),
            ("ask", self._ask_fields, self._ask),
        ):
            if wanted:
                ctx.params[argument] = Given(
                    fields=fields, said=said[argument], names=names, models=[*filter(None, models)]
                )
        return rest

    def invoke(self, ctx: click.Context) -> Any:
        """Check what the verb is asked, and run it."""
        if self._ask is not None:
            try:
                options: Given = ctx.params["ask"]
                ctx.params["ask"] = options.read(self._ask, options.document())
            except InvalidInput as error:
                fail(str(error), code=2)
        return super().invoke(ctx)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The first sentence, the options, and then the rest of the text with the example."""
        first, _, rest = inspect.cleandoc(self.help or "").partition("\n\n")
        self.format_usage(ctx, formatter)
        for text, options in ((first, True), (rest, False)):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(text)
            if options:
                self.format_options(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        sections: dict[str, list[click.Option]] = {}
        if ctx.meta.get(WHOLE_HELP):
            sections = {title: [] for title in TITLES}
            for option in options:
                sections[self._section(option)].append(option)
        elif len(options) > _FEW + 2:  # and the two of help
            shown_options = [o for o in options if not (o.required or o.hidden)]
            used = [o for name in _USED for o in shown_options if name in o.opts]
            sections["Used most"] = [*(o for o in options if o.required), *used][:_MOST]
            sections["Other"] = [o for o in options if {*o.opts} & {*_ALWAYS}]
        else:
            sections["Options"] = options
        for title, shown in sections.items():
            if rows := [*filter(None, (option.get_help_record(ctx) for option in shown))]:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def _section(self, option: click.Option) -> str:
        """The section of --help-all that an option is in."""
        name = str(option.name)
        if name in self._options:
            return self._options[name][0].shown.section
        return MACHINE if name in ("device", "device_map") else "Output"


def option(path: str, value: object = None) -> str:
    """What messages call a field: its option of the verb that runs, or of others."""
    context, field = click.get_current_context(silent=True), document_fields().get(path)
    name = f"--{path.replace('_', '-')}" if field is None else field.name
    if context is not None and isinstance(context.command, DocumentCommand):
        name = context.command.names.get(path, name)
    return name if value in (None, True) else f"{name} {value}"


def report_option(path: str, value: object = None) -> str:
    """What messages about a text to report on call a field: its own option, if it has one."""
    name, context = option(path, value), click.get_current_context(silent=True)
    report_name = f"--report-{name.removeprefix('--')}"
    params = [] if context is None else context.command.params
    options = [word for param in params for word in param.opts]
    return report_name if report_name.split()[0] in options else name


def given_target(given: Given) -> Target | None:
    """The target of a search; None if it has a pattern instead."""
    paths = [path for path in given.said if within(path, "target")]
    if "target/perplexity_rise" not in paths:
        if paths:
            raise InvalidInput(
                f"{', '.join(given.names[path] for path in paths)} is for --within alone. Leave it "
                "out, or give --within."
            )
        if "pattern" not in given.said:
            raise InvalidInput(
                "there is neither a pattern nor a target. Give --pattern, such as 0.5 or 2:4, or "
                "--within, such as 5%, for the highest sparsity that is still good enough."
            )
        return None
    if "pattern" in given.said:
        raise InvalidInput(
            f"--pattern {given('pattern')} says how sparse the model is to be, and --within "
            f"{given('target/perplexity_rise')} asks for it. Give one of them."
        )
    refused = [
        given.names[path]
        for path in given.said
        if path == "confirm" or path.startswith("warm_start/")
    ]
    if refused:
        raise InvalidInput(
            f"{', '.join(refused)} cannot be used with --within: each sparsity is confirmed by "
            "perplexity, in a search of its own. Leave it out."
        )
    return Target.of(**given.document()["target"])
