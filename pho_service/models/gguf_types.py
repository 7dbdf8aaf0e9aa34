"""
A type for each linear of a GGUF file, for its embedding and its head: what rounding costs, and
which types cost least together.

The package gguf rounds to some types. Where llama.cpp's `llama-quantize` is on the PATH, that does
it, for it has more of them, and rounds with an importance matrix.
"""

import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor, nn

from pho_service.errors import InvalidInput, ModelError
from pho_service.models.gguf_file import MORE_BITS, QUANTIZER, quantise, run_program, type_of
from pho_service.models.loading import LanguageModel, load_model
from pho_service.models.scratch import Memo, Record
from pho_service.planning.shapes import BoundedReader
from pho_service.progress import Progress
from pho_service.pruning.perplexity import DenseReference, dense_reference, rate_divergence
from pho_service.pruning.statistics import Statistics
from pho_service.spec.export import LEVELS, OUTER_TOKENS, ChosenTypes, GgufType, Level

SHARED = 32  # weights of a row that share a scale
# Of llama-quantize, by bits; and how a file is called that has this type alone.
LLAMA_LEVELS = {
    "q3_k": "Q3_K_S", "iq4_xs": "IQ4_XS", "iq4_nl": "IQ4_NL", "q4_k": "Q4_K_S", "q5_0": "Q5_0",
    "q5_k": "Q5_K_S", "q5_1": "Q5_1", "q6_k": "Q6_K", "q8_0": "Q8_0",
}  # fmt: skip
_WINDOW = 512  # tokens, that an importance matrix says it is of; only shares matter
_ROWS = 8192  # that are rounded at a time
_OUTER = dict(zip(MORE_BITS, ("embedding", "head"), strict=True))


class Quantiser:
    """
    Writes a model's file again, with fewer bits.

    Args:
        whole: What llama.cpp's converter made of the model. Files are made beside it.
        model: In the memory of the machine.
        statistics: Those of its calibration.
        windows: (windows, tokens), int64: of its calibration. Without them the embedding and the
            head have eight bits.
        memo: Has what types were found to cost before, and keeps what they cost now.
        types: Those to choose from; by default all that are made here.

    Raises:
        ModelError: A linear has no tensor of its own name in the file.
    """

    def __init__(
        self,
        whole: Path,
        model: LanguageModel,
        statistics: Statistics,
        windows: Tensor | None = None,
        memo: Memo | None = None,
        types: Sequence[str] = (),
    ) -> None:
        self.whole, self.model, self.statistics = whole, model, statistics
        self.windows, self.memo = windows, memo
        self.reader = BoundedReader(whole)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.names = self._names()
        self.program = shutil.which(QUANTIZER)
        self.types = types or types_here()
        self.outer = {} if windows is None else self._outer(model)

    @cached_property
    def _reference(self) -> DenseReference:
        """What the model predicts, where its embedding or its head is given other weights."""
        assert self.windows is not None
        few = self.windows[: max(1, OUTER_TOKENS // self.windows.shape[1])]
        return dense_reference(self.model.model, few)

    def _outer(self, model: LanguageModel) -> dict[str, nn.Parameter]:
        """The weights of the embedding, and of a head of its own, by their tensors."""
        network = model.model
        modules = (network.get_input_embeddings(), network.get_output_embeddings())
        return {
            name: module.weight
            for name, module in zip(MORE_BITS, modules, strict=True)
            if name in self.tensors and module is not None
        }

    def _names(self) -> dict[str, str]:
        """The tensor of each linear."""
        architecture = str(self.reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
        count = int(self.reader.fields[f"{architecture}.block_count"].contents())
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        known = gguf.get_tensor_name_map(numbers[architecture], count)
        names = {}
        for linear in self.model.linears:
            # Those of all experts of a block are one tensor.
            name = known.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", linear))
            if name is None or f"{name}.weight" not in self.tensors:
                raise ModelError(
                    f"{self.model.name} as a GGUF file has no tensor of which we know that it is "
                    f"{linear}, so bytes cannot be shared out. Write it in one type."
                )
            names[linear] = f"{name}.weight"
        return names

    def levels(self, progress: Progress) -> dict[str, list[Level]]:
        """
        What each linear can be written as, by its tensor, and what the embedding and the head can
        be: none if its rows have no whole scales.
        """
        costs = self._costs_by_llama(progress) if self.program else self._costs_by_gguf(progress)
        levels = defaultdict(list)
        for (name, gguf_type), nats in costs.items():
            if gguf_type in self.types:
                size = _bytes(self.tensors[name], _kind(gguf_type))
                levels[name].append(Level(type=gguf_type, bytes=size, nats=nats))
        few = {*self.types} < {*types_here()}
        for name in {**self.outer, **dict.fromkeys(self.names.values())} if few else ():
            width = int(self.tensors[name].shape[0])
            if name not in levels and width % SHARED == 0:
                raise InvalidInput(
                    f"{name} of {self.model.name} has rows of {width} weights, which cannot be "
                    f"{' or '.join(self.types)}. Add a type, such as q8_0."
                )
        return levels

    def rest(self, levels: Mapping[str, Sequence[Level]]) -> int:
        """The bytes of all else, in Q8_0 if it is a matrix: norms, the vocabulary."""
        rest = self.whole.stat().st_size + gguf.GGUF_DEFAULT_ALIGNMENT * len(self.tensors)
        for name, tensor in self.tensors.items():
            rest -= int(tensor.n_bytes)
            if name not in levels:
                rest += _bytes(tensor, type_of(tensor, gguf.GGMLQuantizationType.Q8_0))
        return rest

    def write(self, out: Path, most: int, progress: Progress) -> ChosenTypes:
        """
        Write a file of at most so many bytes, in which rounding costs least.

        Raises:
            InvalidInput: With the fewest bits for all, it has more bytes.
        """
        levels = self.levels(progress)
        rest = self.rest(levels)
        while True:
            chosen = choose_types(levels, most - rest)
            if chosen is None:
                least = rest + sum(min(each.bytes for each in known) for known in levels.values())
                raise InvalidInput(
                    f"{self.model.name} has {least / 1e6:.4g} MB with the fewest bits that its "
                    f"matrices can have here, and {most / 1e6:.4g} MB are the most asked for. Give "
                    "more, or cut the model before that (structured pruning)."
                )
            linears = [level for name, level in chosen.items() if name not in MORE_BITS]
            types = Counter(level.type for level in linears)
            self._write(out, chosen, types.most_common(1)[0][0], progress)
            if (over := out.stat().st_size - most) <= 0:
                nats = sum(level.nats for level in chosen.values())
                by_bits = sorted(types, key=lambda each: _bits(_kind(each)))
                return ChosenTypes(
                    types={each: types[each] for each in by_bits},
                    nats=nats,
                    others={_OUTER[n]: chosen[n].type for n in MORE_BITS if n in chosen},
                )
            rest += over  # something else has kept more bits

    def _write(
        self, out: Path, chosen: Mapping[str, Level], usual: str, progress: Progress
    ) -> None:
        if self.program is None:
            kinds = {
                name: type_of(tensor, gguf.GGMLQuantizationType.Q8_0)
                for name, tensor in self.tensors.items()
            }
            kinds |= {n: _kind(c.type) for n, c in chosen.items()}
            quantise(self.reader, out, kinds, usual, progress)
            return
        types = self.whole.with_name("types.txt")
        types.write_text("".join(f"^{re.escape(n)}$={c.type}\n" for n, c in chosen.items()))
        outer = [chosen[name].type if name in chosen else "q8_0" for name in MORE_BITS]
        options = ("--token-embedding-type", outer[0], "--output-tensor-type", outer[1])
        with progress("Quantising", 1) as advance:
            self._run(out, usual, *options, "--tensor-type-file", types.name)
            advance(1)

    def _run(self, out: Path, gguf_type: str, *options: str) -> None:
        importance = self.whole.with_name("importance.gguf")
        if not importance.is_file():
            self._write_importance(importance)
        assert self.program is not None
        program, whole = (str(Path(each).absolute()) for each in (self.program, self.whole))
        files = ("--imatrix", importance.name, *options, whole, str(out.absolute()))
        # In its folder, for the file says how its importance matrix was named.
        run_program(
            [program, *files, LLAMA_LEVELS[gguf_type]], QUANTIZER, self.model.name,
            importance.parent,
        )  # fmt: skip

    def _write_importance(self, file: Path) -> None:
        """Write the mean squares of what each linear reads, as llama.cpp's own tool does."""
        writer = gguf.GGUFWriter(file, "")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["calibration"])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", _WINDOW)
        of_each = Counter(self.names.values())
        for linear, name in self.names.items():
            if of_each[name] == 1:
                squares = self.statistics.activation_norm(linear).float().square().numpy()
                writer.add_tensor(f"{name}.in_sum2", squares[None])
                writer.add_tensor(f"{name}.counts", np.array([[_WINDOW]], dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _costs_by_gguf(self, progress: Progress) -> dict[tuple[str, str], float]:
        costs: dict[tuple[str, str], float] = defaultdict(float)
        works = [
            (linear, name, partial(self._linear, linear)) for linear, name in self.names.items()
        ]
        works += [(name, name, partial(self._outer_one, name)) for name in self.outer]
        with progress("Rounding", len(works)) as advance:
            for place, name, work in works:
                for gguf_type, nats in self._kept(
                    f"{place} as {'-'.join(LEVELS)} by gguf {version('gguf')}", work
                ).items():
                    costs[name, gguf_type] += nats
                advance(1)
        return costs

    def _costs_by_llama(self, progress: Progress) -> dict[tuple[str, str], float]:
        """As it rounds, which depends on the importance matrix: a file of each type is read."""
        costs: dict[tuple[str, str], float] = {}
        assert self.program is not None
        about = Path(self.program).stat()
        with progress("Rounding", len(self.types)) as advance:
            for gguf_type in self.types:
                name = f"{gguf_type} by {QUANTIZER} of {about.st_size} {about.st_mtime_ns}"
                known = self._kept(name, partial(self._all_by_llama, gguf_type))
                costs |= {(name, gguf_type): nats for name, nats in known.items()}
                advance(1)
        return costs

    def _kept(self, name: str, work: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The nats that were worked out under a name before, or are now."""
        if self.memo is None:
            return work()
        if (known := self.memo.read(name)) is not None:
            return {**known.values}
        nats = work()
        self.memo.keep(name, Record(values=nats))
        return nats

    def _linear(self, linear: str) -> dict[str, float]:
        """Tell what each type costs a linear."""
        weight = self.model.linears[linear].weight.detach().float().cpu()
        return {
            gguf_type: self._cost(linear, rounded(weight, gguf_type) - weight)
            for gguf_type in _types_of(weight)
        }

    def _outer_one(self, name: str) -> dict[str, float]:
        """Tell what each type costs the embedding, or the head."""
        place = self.outer[name]
        weight = place.detach().float().cpu()
        return {
            gguf_type: self._divergence(
                place, torch.cat([rounded(rows, gguf_type) for rows in weight.split(_ROWS)])
            )
            for gguf_type in _types_of(weight)
        }

    def _all_by_llama(self, gguf_type: str) -> dict[str, float]:
        """What a type costs each tensor that llama-quantize gives it."""
        nats: dict[str, float] = defaultdict(float)
        out = self.whole.with_name("rounded.gguf")
        self._run(out, gguf_type, "--pure")
        types = {t.name: t.tensor_type.name.lower() for t in BoundedReader(out).tensors}
        read = load_model(str(out), device="cpu")
        linears = read.linears
        for linear, name in self.names.items():
            if types[name] == gguf_type:  # and no other one that its width allows
                weight = self.model.linears[linear].weight.detach().float().cpu()
                nats[name] += self._cost(linear, linears[linear].weight.detach().float() - weight)
        for name, place in self._outer(read).items():
            if name in self.outer and types[name] == gguf_type:
                nats[name] = self._divergence(self.outer[name], place.detach())
        out.unlink()
        return nats

    def _cost(self, linear: str, lost: Tensor) -> float:
        root = self.statistics.inputs[self.statistics.input_of[linear]].root
        return rounding_cost(lost, self.statistics.fisher[linear], root)

    def _divergence(self, place: nn.Parameter, weight: Tensor) -> float:
        """What predictions differ by from the model's with other weights there, in nats a token."""
        reference, before = self._reference, place.data  # that one is of the weights as they are
        place.data = weight.to(before)
        try:
            return rate_divergence(self.model.model, reference)
        finally:
            place.data = before


def types_here() -> tuple[str, ...]:
    """The types that matrices of a file of so many bytes can have here, by bits."""
    return (*LLAMA_LEVELS,) if shutil.which(QUANTIZER) else LEVELS


def check_types(types: Sequence[str]) -> None:
    """See before any long work that all of some types are made here."""
    if unknown := [name for name in types if name not in types_here()]:
        raise InvalidInput(
            f"types {', '.join(unknown)}: a file of so many bytes has {', '.join(types_here())} "
            f"here. Choose among these; {QUANTIZER} on the PATH makes q3_k to q6_k, too."
        )


def _types_of(weight: Tensor) -> tuple[GgufType, ...]:
    """The types that the package gguf gives it: none if its rows have no whole scales."""
    return LEVELS if weight.shape[1] % SHARED == 0 else ()


def rounded(weight: Tensor, gguf_type: GgufType) -> Tensor:
    """A matrix as the package gguf reads it after it has written it in a type."""
    kind = _kind(gguf_type)
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))


def rounding_cost(lost: Tensor, fisher: Tensor, root: Tensor) -> float:
    """
    What the loss rises by, to second order, when the weights of a linear change: nats a token.

    Args:
        lost: (out_features, in_features), what is added to the weights.
        fisher: (out_features,), mean squares of the loss's gradient.
        root: (rows, in_features): ``root.T @ root`` is the second moment of the input. An offset
            that 32 weights share moves them all one way, which activation norms do not see.
    """
    return float(fisher.cpu() @ (lost @ root.cpu().T).square().sum(dim=1)) / 2


def _kind(gguf_type: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[gguf_type.upper()]


def _bits(kind: gguf.GGMLQuantizationType) -> float:
    """Bits of a weight."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    return 8 * size / weights


def _bytes(tensor: gguf.ReaderTensor, kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(tensor.n_elements) // block * size


def choose_types(levels: Mapping[str, Sequence[Level]], most: int) -> dict[str, Level] | None:
    """
    The level of each matrix, so that together they cost least in so many bytes; None if none fit.

    All begin with the fewest bytes. The step up that wins most for a byte comes first, along the
    lower convex hull of each matrix: exact for the bytes that each step ends at (Lagrange), and
    what is left over is filled with the next ones that fit.
    """
    hulls = {name: _hull(known) for name, known in levels.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    room = most - sum(level.bytes for level in chosen.values())
    if room < 0:
        return None
    steps = sorted(
        (_won(low, high), name, index)
        for name, hull in hulls.items()
        for index, (low, high) in enumerate(pairwise(hull))
    )
    for _, name, index in reversed(steps):
        low, high = hulls[name][index : index + 2]
        if chosen[name] is low and high.bytes - low.bytes <= room:
            chosen[name] = high
            room -= high.bytes - low.bytes
    return chosen


def _won(low: Level, high: Level) -> float:
    """Nats for a byte."""
    return (low.nats - high.nats) / (high.bytes - low.bytes)


def _hull(levels: Sequence[Level]) -> list[Level]:
    """Those that no two others do better than: each step wins less for a byte than the last."""
    hull: list[Level] = []
    for level in sorted(levels, key=lambda each: (each.bytes, each.nats)):
        if hull and level.nats >= hull[-1].nats:
            continue
        while len(hull) > 1 and _won(hull[-2], hull[-1]) <= _won(hull[-1], level):
            hull.pop()
        hull.append(level)
    return hull
