"""
`pho prune`, `pho pack`, `pho export` and their like: from a configuration to a model on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from pho_service.cli.document import DocumentCommand, Given
from pho_service.cli.library import (
    LIBRARY,
    LibraryEntry,
    best_of_library,
    check_library,
    wanted_for,
)
from pho_service.cli.minutes import calibrated_in_minutes
from pho_service.cli.options import (
    Terminal,
    calibration_source,
    check_bundle,
    check_models,
    device_options,
    json_verb,
)
from pho_service.cli.searched import (
    CutAsk,
    calibrated_few,
    prune_by_search,
    pruned_values,
    show_pruned,
)
from pho_service.cli.terminal import print_json, print_table, progress, say
from pho_service.errors import ConfigurationError, InvalidInput, ModelError
from pho_service.pipeline.work import Work
from pho_service.spec.document import MACHINE, PRUNED, TEXT, FieldShown, number, parse_bytes
from pho_service.spec.export import GgufType
from pho_service.spec.job_options import within
from pho_service.spec.pattern import Linears, Pattern, ScopeName
from pho_service.spec.structure import Structure, is_structured

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pho_service.models.loading import LanguageModel
    from pho_service.pruning.bundle import ProxyBundle
    from pho_service.spec.configuration import Configuration
    from pho_service.spec.fields import CalibrationSpec


PUBLIC = "Everybody can see a new repository; by default only you can."
_OF_ZEROS = {"deployable": "steps/deployable", "stream": "stream"}  # options that cuts lack
# The seed is the calibration's.
_OF_SEARCHES = (
    "preset", "steps/reconstruction", "trials", "in_full", "confirm/text", "confirm/windows",
    "confirm/finalists", "report", "recovery",
)  # fmt: skip
TRIED = 5  # configurations of a library that are rated by the proxy, the most promising first


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the configuration comes from: it is given, or else chosen from a library."""

    configuration: "Configuration | None"
    library: str | None
    pattern: str | None
    scope: str | None
    force: bool
    deployable: bool  # Whether it may only permute what can be folded into the weights

    def of_library(self, model: "LanguageModel") -> "list[LibraryEntry]":
        """The most promising configurations for a model, the best first."""
        wanted = wanted_for(
            {"name": model.name, "family": model.family, "parameters": model.parameters},
            str(self.pattern),
            self.scope,
        )
        return best_of_library(self.library, wanted, 1 if self.force else TRIED)

    def chosen(
        self, entries: Sequence["LibraryEntry"], model: "LanguageModel", bundle: "ProxyBundle"
    ) -> "LibraryEntry":
        """The first that the proxy does not judge worse than RIA."""
        from pho_service.errors import BundleError
        from pho_service.pipeline.transfer import proxies_of, proxy_sentence
        from pho_service.spec.results import no_better_than_ria

        for entry in entries:
            about = f"{entry.origin['id']} of the library"
            try:
                proxies = proxies_of(bundle, entry.configuration, str(model.device))
            except BundleError as error:
                sentence = f"Note: whether it holds on {model.name} is not known: {error}"
            else:
                if no_better_than_ria(proxies) and not self.force:
                    say(
                        f"Leaving {about} out: its proxy on {model.name}, "
                        f"{number(proxies['transferred'])}, is no better than RIA's, "
                        f"{number(proxies['ria'])}."
                    )
                    continue
                sentence = proxy_sentence(model.name, proxies)
            say(f"Taking {about}: {'; '.join(entry.origin['reasons'])}.")
            say(sentence)
            return entry
        raise ConfigurationError(
            f"none of the library's {len(entries)} most promising configurations for "
            f"{self.pattern} holds on {model.name}: by the proxy each is no better than RIA. "
            f"Search there: `pho search {model.name} --pattern {self.pattern}`; or take the most "
            "promising one in spite of that with --force."
        )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--public", is_flag=True, help=PUBLIC)
@json_verb
def push(folder: Path, repository: str, public: bool, as_json: bool) -> None:
    """
    Upload a pruned FOLDER to the Hugging Face hub, as REPOSITORY (org/name).

    The token is that of HF_TOKEN, or of `hf auth login`. In pruning.json, models
    and texts of this machine are named without their folders.

    \b
    Example:
      pho push pruned my-org/SmolLM2-135M-pruned
    """
    push_folder(folder, repository, public, as_json)


def push_folder(folder: Path, repository: str, public: bool, as_json: bool) -> None:
    """Upload, and say where to."""
    from pho_service.models.saving import push as upload

    address = upload(folder, repository, public=public)
    if as_json:
        print_json({"folder": str(folder), "repository": repository, "commit": address})
        return
    say(f"{folder} is at {address}")


@dataclass(frozen=True, kw_only=True)
class _PruneAsk(CutAsk):
    """
    What a model is pruned with, and where it goes; or a folder to check instead.

    Attributes:
        config: A configuration.
        method: A published method instead, by its name in `pho compare`, for --pattern: wanda,
            sparsegpt.
        from_library: Take the most promising configuration of a library for --pattern instead.
        pattern: 0.5 or 2:4; by itself, in the way that a search finds best. structured:20% is the
            share of the blocks' weights to cut, smaller:20% that of the file: neurons and query
            heads. faster:1.2x and bytes:95MB are --faster and --bytes.
        scope: Where weights compete. With --from-library any by default; with --method for those
            that have none of their own.
        force: With --from-library: take the most promising one even if the proxy says that RIA is
            better on MODEL.
        out: A new or empty folder.
        push: Upload the folder to the hub, too: org/name.
        bundle: Take the statistics from here instead of calibrating on a text.
        check: Check a pruned folder instead, or a packed one; with MODEL, the dense original, also
            what stayed.
    """

    config: Annotated[str | None, FieldShown(section=PRUNED, kind="path")] = None
    method: Annotated[str | None, FieldShown(section=PRUNED, picks="methods")] = None
    from_library: Annotated[bool, FieldShown(section=PRUNED)] = False
    library: Annotated[str | None, FieldShown(section=PRUNED, help=LIBRARY)] = None
    pattern: Annotated[str | None, FieldShown(section=PRUNED)] = None
    scope: Annotated[ScopeName | None, FieldShown(section=PRUNED)] = None
    force: Annotated[bool, FieldShown(section=PRUNED)] = False
    out: Annotated[str | None, FieldShown(kind="path")] = None
    push: str | None = None
    public: Annotated[bool, FieldShown(help=PUBLIC)] = False
    bundle: Annotated[str | None, FieldShown(section=TEXT, kind="path")] = None
    check: Annotated[str | None, FieldShown(kind="path")] = None


@click.command(
    cls=DocumentCommand,
    fields=(
        "steps/linears", "steps/deployable", "calibration", "revision", "dtype", "stream",
        "minutes", *_OF_SEARCHES,
    ),
    ask=_PruneAsk,
)  # fmt: skip
@click.argument("model", required=False)
@device_options
@json_verb
def prune(model: str | None, given: Given, ask: _PruneAsk, inputs: Terminal, as_json: bool) -> None:
    """
    Prune MODEL and save it as a Hugging Face folder.

    The folder has safetensors with exact zeros, the tokenizer, masks, the recipe
    (pruning.json) and a card. Zeros alone make nothing smaller or faster: that
    needs a runtime that skips them.

    --pattern alone searches for what is best for MODEL, as `pho search` does, in
    the minutes that it has. What they leave goes into a recovery of the pruned
    model, which --no-recovery leaves out. --config takes what a search has found,
    --method a published method. --from-library takes what was found on other models
    (`pho configurations` shows it), unless the proxy judges it no better than RIA
    on MODEL. --deployable keeps a permutation to what can be folded into the
    weights. --check compares a folder with its recipe.

    --pattern structured:20% cuts neurons and query heads out of every block, so
    that the folder is an ordinary, smaller model, and faster in every runtime.
    --smaller and --faster find the share for a size or a speed.

    \b
    Example:
      pho prune HuggingFaceTB/SmolLM2-135M --pattern 0.5 --text book.txt --out pruned
      pho prune HuggingFaceTB/SmolLM2-135M --config config.json \\
          --text book.txt --out pruned
      pho prune HuggingFaceTB/SmolLM2-135M --method wanda-permuted \\
          --pattern 2:4 --text book.txt --out wanda24
      pho prune HuggingFaceTB/SmolLM2-360M --from-library --pattern 2:4 \\
          --text book.txt --out pruned
      pho prune HuggingFaceTB/SmolLM2-135M --check pruned
    """
    chosen = {
        "--config": ask.config,
        "--method": ask.method,
        "--from-library": ask.from_library or None,
    }
    named = {given.names[path]: path for path in given.said if path.startswith("steps/linears/")}
    of_library = {"--library": ask.library, "--force": ask.force or None}
    pruning = {**of_library, "--pattern": ask.pattern, "--scope": ask.scope, **named}
    pruning |= {**ask.options, "--minutes": given.said.get("minutes")}
    of_searches = [
        given.names[path]
        for path in given.said
        if any(within(path, field) for field in _OF_SEARCHES)
    ] + ["--no-recovery"] * ask.no_recovery
    if ask.check:
        pruning["--deployable"] = given("steps/deployable")
        others = {
            **chosen, **pruning, **dict.fromkeys(of_searches, True),
            "--out": ask.out, "--push": ask.push, "--bundle": ask.bundle,
        }  # fmt: skip
        too_many = [name for name, value in others.items() if value is not None]
        if too_many:
            raise InvalidInput(
                f"--check takes a folder and prunes nothing: leave {', '.join(too_many)} out."
            )
        _check(Path(ask.check), model, as_json, inputs)
        return
    sources = [name for name, value in chosen.items() if value is not None]
    searched = ask.asked_search(ask.pattern, alone=not sources)
    if of_searches and not searched:
        raise InvalidInput(
            f"{', '.join(of_searches)}: only for a search, which --pattern by itself, --smaller, "
            "--faster and --bytes ask for. Leave it out; `pho recover` recovers a folder."
        )
    if not (model and ask.out) or (len(sources) != 1 and not searched):
        raise InvalidInput(
            "MODEL, --out, and one of --pattern, --config, --method, --from-library, --smaller, "
            "--faster and --bytes are needed to prune; to check a folder, --check."
        )
    if ask.config is None and ask.pattern is None and not searched:
        which = "--method" if ask.method else "--from-library"
        raise InvalidInput(f"{which} needs a --pattern: 0.5 or 2:4, say.")
    if ask.public and ask.push is None:
        raise InvalidInput("--public is for --push. Leave it out.")
    if searched:
        _refuse_beside(
            searched, ask, given, {**chosen, **of_library, "--bundle": ask.bundle}, named
        )
    else:
        _refuse(ask, pruning=pruning, of_library=of_library, named=named)
    # A wrong one is refused before a model is read.
    words = ask.pattern or ask.cut
    pattern = None if words is None else Pattern.parse(words, ask.scope)
    configuration = _given_configuration(ask, given)
    _check_places(model, Path(ask.out), ask.bundle, inputs)
    if searched:
        assert pattern is not None  # which is searched for
        prune_by_search(model, pattern, Path(ask.out), given, as_json, inputs, ask.no_recovery)
    else:
        _prune_as_said(model, ask, configuration, given, as_json, inputs)
    if ask.push is not None:
        push_folder(Path(ask.out), ask.push, ask.public, as_json=False)


def _prune_as_said(
    model: str,
    ask: _PruneAsk,
    configuration: "Configuration | None",
    given: Given,
    as_json: bool,
    inputs: Terminal,
) -> None:
    """Prune with a configuration, a published method, or what a library has."""
    loaded = None
    if ask.method is not None and configuration is not None and ask.bundle is None:
        loaded, calibration = _in_minutes(model, configuration, given, inputs)
    else:
        calibration = given.calibration([configuration] if configuration and not ask.bundle else [])
    source = Source(
        configuration=configuration,
        library=ask.library,
        pattern=ask.pattern,
        scope=ask.scope,
        force=ask.force,
        deployable=bool(given("steps/deployable")),
    )
    statistics = _Statistics(
        bundle=ask.bundle,
        calibration=calibration,
        named=bool({"calibration/text", "calibration/dataset"} & {*given.said}),
    )
    _prune(model, loaded, source, Path(str(ask.out)), statistics, given, as_json, inputs)


def _given_configuration(ask: _PruneAsk, given: Given) -> "Configuration | None":
    """What a file or a method's name says; None if a library is asked."""
    from pho_service.spec.configuration import published, read_configuration

    if ask.config is not None:
        return read_configuration(Path(ask.config))
    if ask.method is None:
        return None
    linears = given.part("steps/linears", Linears)
    return published(ask.method, str(ask.pattern), ask.scope, linears)


def _check_places(model: str, folder: Path, bundle: str | None, inputs: Terminal) -> None:
    from pho_service.host.files import check_free

    check_free(folder)
    model_path = Path(model).expanduser()
    if model_path.is_dir() and folder.expanduser().resolve().is_relative_to(model_path.resolve()):
        raise InvalidInput(f"{folder} would lie in {model}, which is pruned. Give another place.")
    check_models([model], inputs.revision)
    if bundle is not None:
        check_bundle(bundle)


def _in_minutes(
    model: str, configuration: "Configuration", given: Given, inputs: Terminal
) -> "tuple[LanguageModel | None, CalibrationSpec]":
    """What a published method is calibrated on, and the model, where the minutes choose it."""
    from pho_service.planning.plan import ComparedWork

    document = {"model": model, "pattern": str(configuration.pattern), "confirm": None}
    spec = given.job(given.document(document))
    if not spec.free_sizes:
        return None, given.calibration()
    work = ComparedWork(
        rows=[configuration.candidate().steps], searches=[], windows=1, calibrations=1
    )
    source, loaded = calibration_source(spec.calibration), inputs.model(model)
    method = configuration.method
    return loaded, calibrated_in_minutes(spec, loaded, source, work, method)


def _refuse(
    ask: _PruneAsk,
    *,
    pruning: "Mapping[str, object]",
    of_library: "Mapping[str, object]",
    named: "Mapping[str, object]",
) -> None:
    """See that no option is given that is for another source of the configuration."""
    library = ask.config is None and ask.method is None
    minutes = {"--minutes": pruning["--minutes"]}
    for refused, foreign, reason in (
        (not library, of_library, "for --from-library alone"),
        (ask.config is not None, pruning, "a configuration has its pattern, scope and linears"),
        (library, minutes, "what is in a library is calibrated as it was found"),
        (library, named, "for --method; what is in a library says which linears it prunes"),
    ):
        too_many = [name for name, value in foreign.items() if value is not None]
        if refused and too_many:
            raise InvalidInput(f"{', '.join(too_many)}: {reason}. Leave it out.")


def _refuse_beside(
    searched: str,
    ask: _PruneAsk,
    given: Given,
    foreign: "Mapping[str, object]",
    named: "Mapping[str, object]",
) -> None:
    """See that no option is given that a search of one's own has no use for."""
    about, others = "searches, and calibrates on a text", {**foreign}
    if ask.pattern is None or is_structured(ask.pattern):
        about = "cuts neurons and heads out of a model"
        others |= {"--scope": ask.scope, **named}
        others |= {f"--{name}": given(path) or None for name, path in _OF_ZEROS.items()}
    if too_many := [name for name, value in others.items() if value is not None]:
        raise InvalidInput(
            f"{searched} {about}, for which {', '.join(too_many)} says nothing. Leave it out."
        )


@dataclass(frozen=True, kw_only=True)
class _Statistics:
    """Return the source of the statistics."""

    bundle: str | None  # A file, if they are there already
    calibration: "CalibrationSpec"  # How they are made if not, or the windows that steps need
    named: bool  # Whether a text was named, and is not the default


def _prune(
    name: str,
    loaded: "LanguageModel | None",
    source: Source,
    folder: Path,
    statistics: _Statistics,
    given: Given,
    as_json: bool,
    inputs: Terminal,
) -> None:
    from pho_service.pipeline.prune import prune_job, winner_of

    entry = None
    if source.configuration is None:
        check_library(source.library, str(source.pattern), source.scope)
        model = inputs.model(name)
        promising = _prunable(source.of_library(model), statistics)
        configurations = [promising_entry.configuration for promising_entry in promising]
        if statistics.bundle is None:
            statistics = replace(statistics, calibration=given.calibration(configurations))
        opened = _opened(model, statistics, configurations, inputs, rated=True)
        entry = source.chosen(promising, model, opened.bundle)
        configuration = entry.configuration
    else:
        configuration = source.configuration
        opened = _opened(loaded or name, statistics, [configuration], inputs)
        key = configuration.calibration.get("key")
        if key and key != opened.bundle.key:
            say(
                "Note: these statistics are not those of the search (other text, settings, model "
                "or versions), so the perplexity may differ from the one in the configuration."
            )
    if source.deployable:
        configuration = configuration.deployable()
    configuration = configuration.for_size(opened.model.parameters)
    blocks = opened.blocks(winner_of(configuration))
    result = prune_job(
        opened,
        configuration,
        folder,
        origin=entry.origin if entry else None,
        memo=blocks if blocks and blocks.folder.is_dir() else None,
        progress=progress,
    )
    if as_json:
        print_json(
            {
                "out": str(folder),
                "origin": entry.origin if entry else None,
                **pruned_values(result),
            }
        )
        return
    show_pruned(folder, configuration, result)


def _prunable(entries: "list[LibraryEntry]", statistics: _Statistics) -> "list[LibraryEntry]":
    """Without those that need a text where there is none, unless all do."""
    if statistics.bundle is None or statistics.named:
        return entries
    textless = [entry for entry in entries if not entry.configuration.candidate().steps.needs_text]
    return textless or entries


def _opened(
    model: "LanguageModel | str",
    statistics: _Statistics,
    configurations: Sequence["Configuration"],
    inputs: Terminal,
    *,
    rated: bool = False,
) -> Work:
    """The model, its statistics, and the calibration windows if there is a text."""
    from pho_service.models.bundle_file import read_bundle

    settings = statistics.calibration.settings()
    if rated:  # the proxy rates what a library has
        scores = [configuration.candidate().coefficients for configuration in configurations]
        sizes = {score.kernel_size for score in scores}
        missing = sorted(sizes - {*settings.kernel_sizes})
        settings = replace(settings, kernel_sizes=(*settings.kernel_sizes, *missing))
    needs_text = any(
        configuration.cut is not None or configuration.candidate().steps.needs_text
        for configuration in configurations
    )
    named = statistics.named
    if statistics.bundle is None:
        candidates = [
            configuration.candidate()
            for configuration in configurations
            if not rated and configuration.cut is None
        ]
        own_text = calibration_source(statistics.calibration)
        return inputs.calibrated(model, own_text, settings, requests=candidates)
    if named and not (needs_text or inputs.stream):  # streamed ones needed it once
        raise InvalidInput("--bundle and a text are both given. Give one of them.")
    if needs_text and not named:
        raise InvalidInput(
            "a bundle is not enough to re-prune or update weights. Give the calibration text too: "
            "--text with the --samples and --context-length of the search. What --preset score "
            "finds needs none."
        )
    bundle = read_bundle(Path(statistics.bundle))
    source = calibration_source(statistics.calibration) if named else None
    loaded = inputs.model(model) if isinstance(model, str) else model
    text = None if source is None else inputs.windows(loaded, source, settings)
    return Work(
        bundles={loaded.name: bundle},
        dense=loaded,
        calibration=None if text is None else text.calibration,
        cache_dir=inputs.cache,
    )


def _check(folder: Path, original: str | None, as_json: bool, inputs: Terminal) -> None:
    from dataclasses import asdict

    from transformers.utils.logging import disable_progress_bar

    from pho_service.models.packed import as_folder
    from pho_service.models.saving import read_recipe
    from pho_service.pipeline.check import check_folder

    disable_progress_bar()  # ours is shown
    loaded = None
    if original is not None:
        if inputs.dtype == "auto":  # the hash of the original's weights depends on it
            with as_folder(folder) as small:
                inputs = replace(inputs, dtype=read_recipe(small).model.dtype)
        loaded = inputs.model(original)
    checks = check_folder(folder, original=loaded, progress=progress)
    if as_json:
        shown = [{**asdict(check), "skipped": check.skipped} for check in checks]
        print_json({"folder": str(folder), "checks": shown})
    else:
        print_table(
            str(folder),
            ("check", "result", "detail"),
            [(check.name, check.result, check.detail) for check in checks],
        )
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise ModelError(
            f"{folder} is not what its recipe says: {', '.join(failed)}. Prune the model again."
        )


@click.command()
@click.argument("folder")
@click.option("--out", required=True, help="A file whose name ends in .pho.")
@json_verb
def pack(folder: str, out: str, as_json: bool) -> None:
    """
    Make a model folder smaller, without losing a bit.

    Wherever a MODEL is asked for, what is packed can be given.

    \b
    Example:
      pho pack pruned --out pruned.pho
      pho prune --check pruned.pho
      pho evaluate pruned.pho --text report.txt
    """
    from pho_service.models.packed import pack as pack_folder

    size = pack_folder(folder, out, progress=True)
    if as_json:
        print_json(
            {"out": out, "bytes": size.after, "unpacked_bytes": size.before, "ratio": size.ratio}
        )
        return
    click.echo(f"{out}: {size.after:,} bytes, {size.ratio:.3f} of the {size.before:,} of {folder}")


@dataclass(frozen=True, kw_only=True)
class _ExportAsk:
    """
    The file to write.

    Attributes:
        gguf: A file whose name ends in .gguf.
        type: Type of its matrices, bf16 by default. Those of five bits and fewer leave the
            embedding at eight.
        bytes: The most that the file may have: 110MB. Each linear gets a type by what its rounding
            costs on a text: --text, 16 windows of up to 512 tokens by default. llama-quantize on
            the PATH has more types than q4_0 to q8_0.
        types: Those that --bytes chooses from, with commas between: q8_0,q4_0. By default all.
        converter: llama.cpp's convert_hf_to_gguf.py. By default that of the package.
        device: Where it is read back: auto, cpu, cuda or cuda:N.
    """

    gguf: Annotated[Path, FieldShown(kind="path")]
    type: GgufType | None = None
    bytes: str | None = None
    types: Annotated[Sequence[str], FieldShown(kind="words")] = ()
    converter: Annotated[str | None, FieldShown(kind="path")] = None
    device: Annotated[str, FieldShown(section=MACHINE)] = "auto"


@click.command(cls=DocumentCommand, fields=("calibration",), ask=_ExportAsk)
@click.argument("folder")
@json_verb
def export(folder: str, given: Given, ask: _ExportAsk, as_json: bool) -> None:
    """
    Write a model FOLDER as a GGUF file, for llama.cpp and what is built on it.

    FOLDER may be packed. llama.cpp's own converter writes the file, and PHO reads
    it back and compares what it predicts with FOLDER before it is there.

    \b
    Example:
      pho export pruned --gguf pruned-q8_0.gguf --type q8_0
      pho export pruned --gguf pruned-110.gguf --bytes 110MB --text book.txt
    """
    from pho_service.models.gguf_file import converter_for
    from pho_service.models.gguf_types import check_types
    from pho_service.pipeline.export import check_export
    from pho_service.pipeline.export import export as export_folder

    most = bundle = windows = memo = None
    if ask.bytes is not None:
        if ask.type is not None:
            raise InvalidInput(
                f"--type {ask.type} is one type, and --bytes {ask.bytes} chooses them. Give one."
            )
        most = parse_bytes(ask.bytes, "--bytes")
        check_types(ask.types)
        check_export(Path(folder), ask.gguf)
        converter_for(["q8_0"], ask.converter)
        work = calibrated_few(folder, given, Terminal(device=ask.device))
        bundle, windows, memo = work.bundle, work.calibration, work.blocks(Structure())
    elif said := [*(["types"] if ask.types else []), *sorted(given.said)]:
        raise InvalidInput(f"{', '.join(said)}: what --bytes chooses types by. Give that, too.")
    exported = export_folder(
        folder, ask.gguf, ask.type or "bf16", most=most, types=ask.types, bundle=bundle,
        windows=windows, memo=memo, converter=ask.converter, device=ask.device, progress=progress,
    )  # fmt: skip
    if as_json:
        print_json(exported.to_dict())
        return
    click.echo(exported)


@click.command()
@click.argument("packed")
@click.option("--out", required=True, help="A new or empty folder.")
@json_verb
def unpack(packed: str, out: str, as_json: bool) -> None:
    """
    Restore the folder that `pho pack` has packed, bit for bit.

    Each file is compared with its checksum; if one is damaged, nothing is written.

    \b
    Example:
      pho unpack pruned.pho --out pruned
    """
    from pho_service.models.packed import unpack as unpack_file

    files = unpack_file(packed, out, progress=True)
    if as_json:
        print_json({"out": out, "files": files})
        return
    click.echo(f"{out}: {files} files, each as its checksum says")
