"""
What can be cut out of a decoder's blocks: neurons, query heads and whole layers, in place.

All of it is known by shapes, by who reads what, and by the model that transformers builds of the
new configuration: a cut model is always one that it can load.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pho_service.errors import InvalidInput, ModelError
from pho_service.models.architecture import decoder_blocks, prunable_linears, unfuse_experts
from pho_service.models.blockwise import split_call
from pho_service.models.loading import LanguageModel
from pho_service.pruning.hardware import to_device
from pho_service.pruning.permutation import find_writers
from pho_service.pruning.perplexity import forward_replaced
from pho_service.pruning.statistics import InputGroups, PrunableLinear, watched
from pho_service.spec.structure import BlockShapes, usual_multiple

logger = logging.getLogger(__name__)

_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")  # of FFNs, in configs
_TOKENS = 4  # of the text that shows which linears read the same input
_PLAIN = (int, float, str, bool, type(None))  # attributes of modules that sizes or places decide


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neurons of an FFN, or query heads of an attention: groups of a reader's input columns."""

    reader: PrunableLinear
    writers: tuple[PrunableLinear, ...]  # Their rows leave with the reader's columns
    count: int  # Neurons, or query heads
    group: int = 1  # Input columns of each
    # (query heads,): the key-value head of each, of which as many leave as of any other.
    within: Tensor | None = None

    @property
    def weights(self) -> int:
        """Weights that leave with one of them."""
        rows = sum(writer.weight.shape[1] for writer in self.writers)
        return self.group * (rows + self.reader.weight.shape[0])

    def columns(self, kept: Tensor) -> Tensor:
        """The input columns of the groups that are kept."""
        return (kept[:, None] * self.group + torch.arange(self.group)).flatten()

    def sizes(self, kept: int) -> dict[int, torch.Size]:
        """The shapes of all parameters that are cut, by identity, when so many are kept."""
        columns = kept * self.group
        rows = self.reader.weight.shape[0]
        shapes: dict[int, tuple[int, ...]] = {id(self.reader.module.weight): (rows, columns)}
        for writer in self.writers:
            shapes[id(writer.module.weight)] = (columns, writer.weight.shape[1])
            if isinstance(bias := writer.module.bias, Tensor):
                shapes[id(bias)] = (columns,)
        transposed = {id(x.module.weight) for x in (self.reader, *self.writers) if x.transposed}
        return {
            key: torch.Size(shape[::-1] if key in transposed else shape)
            for key, shape in shapes.items()
        }


class Anatomy:
    """The parts of a model's blocks that can be cut; of use until the blocks are."""

    def __init__(self, model: LanguageModel) -> None:
        if model.stream:
            raise InvalidInput(
                f"{model.name} is streamed, and blocks cannot be cut while their weights stay in "
                "files. Load it without streaming."
            )
        self.model = model
        self.blocks = dict(decoder_blocks(model.model))
        self._config = model.model.config.get_text_config()
        self._input_of, self._extras = _traced(model, self.blocks)

    def neurons(self, block: str) -> Part:
        """The FFN of a block: the only linear whose input channels may stand in any order."""
        linears = self._linears(block)
        if any(linear.siblings for linear in linears.values()):
            raise ModelError(
                f"{block} is a mixture of experts, whose neurons are not cut: each expert sees "
                "few tokens. Cut query heads or layers instead."
            )
        readers = linears.keys() & self.model.foldable
        if len(readers) != 1:
            raise ModelError(
                f"{block} has {len(readers)} linears whose input channels others beside them "
                "write, one for one. An FFN whose neurons can be cut has one, as down_proj behind "
                "gate_proj and up_proj; fused projections have none. Cut layers or query heads "
                "instead."
            )
        (name,) = readers
        writers = find_writers(self.model.model, linears[name], linears)
        width = linears[name].weight.shape[1]
        return Part(reader=linears[name], writers=tuple(writers), count=width)

    def query_heads(self, block: str) -> Part:
        """The query heads of a block; where each has its own keys and values, these as well."""
        heads, key_value_heads, head_dim = self.heads
        siblings: dict[str, list[PrunableLinear]] = {}
        for name, linear in self._linears(block).items():
            siblings.setdefault(name.rpartition(".")[0], []).append(linear)
        rows = sorted(head_dim * count for count in (heads, key_value_heads, key_value_heads))
        for beside in siblings.values():
            inputs = [self._input_of.get(linear.name) for linear in beside]
            readers = [
                x for x, place in zip(beside, inputs, strict=True) if inputs.count(place) == 1
            ]
            projections = [x for x in beside if x not in readers]
            if [x.weight.shape[1] for x in readers] == [heads * head_dim] and sorted(
                x.weight.shape[0] for x in projections
            ) == rows:  # three that read one input, and the one that reads what they give
                own = heads == key_value_heads
                queries = [x for x in projections if own or x.weight.shape[0] == rows[-1]]
                of_key = torch.arange(heads) // (heads // key_value_heads)
                return Part(
                    reader=readers[0],
                    writers=tuple(queries),
                    count=heads,
                    group=head_dim,
                    within=None if own else of_key,
                )
        raise ModelError(
            f"{block} has no attention whose heads can be cut: one with linears of their own for "
            f"{heads} queries and {key_value_heads} keys and values of {head_dim} channels each, "
            "and a linear that reads the result. Many models, such as GPT-2, have fused ones. Cut "
            "neurons or layers instead."
        )

    @property
    def heads(self) -> tuple[int, int, int]:
        """Number of query heads and of key-value heads, and channels of each."""
        heads = self._config.num_attention_heads
        key_value_heads = getattr(self._config, "num_key_value_heads", None) or heads
        head_dim = getattr(self._config, "head_dim", None) or self._config.hidden_size // heads
        return heads, key_value_heads, head_dim

    def _linears(self, block: str) -> dict[str, PrunableLinear]:
        linears = self.model.linears
        return {name: linear for name, linear in linears.items() if name.startswith(f"{block}.")}

    @contextmanager
    def skipped(self, block: str) -> Iterator[None]:
        """Inside, a block hands on its input."""
        extras = self._extras[block]

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            hidden, _ = split_call(args, kwargs)
            return hidden if extras is None else (hidden, *[None] * extras)

        with forward_replaced(self.blocks[block], hand_on):
            yield

    def resized(
        self, neurons: int | None, query_heads: int | None, *, multiple: int | None = None
    ) -> PreTrainedModel:
        """
        Build what transformers would load after a cut, without weights; the model stays as it is.

        Raises:
            InvalidInput: A number out of range, or sizes that transformers refuses.
            ModelError: Blocks that differ or cannot be cut, or a configuration that cannot say so.
        """
        config = copy.deepcopy(self.model.model.config)
        shapes: dict[int, torch.Size] = {}
        text = config.get_text_config()
        for block in self.blocks:
            if neurons is not None:
                part = self.neurons(block)
                self._check_width(block, part.count, neurons, multiple)
                _set_width(text, part.count, neurons)
                shapes |= part.sizes(neurons)
            if query_heads is not None:
                part = self.query_heads(block)
                shapes |= part.sizes(query_heads)
        if query_heads is not None:
            _set_heads(text, self.heads, query_heads)
        twin = _built(self.model, config)
        places = range(len(self.blocks))
        _check_twin(self.model.model, twin, shapes, places, sized=True)
        return twin

    def _check_width(self, block: str, width: int, neurons: int, multiple: int | None) -> None:
        step = multiple or usual_multiple(width)
        if not 0 < neurons <= width or (neurons % step and neurons != width):
            raise InvalidInput(
                f"neurons={neurons} is not a width for {block}, whose FFN has {width}: a smaller "
                f"one is a multiple of {step}, which kernels and quantised files want. Give "
                f"{max(step, min(width, round(neurons / step) * step))}."
            )

    def without_layers(self, kept: Sequence[int]) -> PreTrainedModel:
        """As :meth:`resized`, with the blocks of these indices alone."""
        count = len(self.blocks)
        outside = [index for index in kept if not 0 <= index < count]
        if outside or not kept:
            raise InvalidInput(
                f"layers={[*kept]} does not fit {self.model.name}, which has {count} blocks: name "
                f"at least one of 0 to {count - 1}."
            )
        config = copy.deepcopy(self.model.model.config)
        _set_layers(config.get_text_config(), count, kept)
        twin = _built(self.model, config)
        _check_twin(self.model.model, twin, {}, kept, sized=False)
        return twin


@torch.no_grad()
def _traced(
    model: LanguageModel, blocks: dict[str, nn.Module]
) -> tuple[dict[str, int], dict[str, int | None]]:
    """Run a few tokens: which input each linear reads, and what blocks give beside the states."""
    groups = InputGroups()
    extras: dict[str, int | None] = {}
    handles = [
        module.register_forward_hook(
            lambda _module, _args, output, name=name: extras.__setitem__(
                name, len(output) - 1 if isinstance(output, tuple) else None
            )
        )
        for name, module in blocks.items()
    ]

    def see(name: str, x: Tensor, _output: Tensor) -> None:
        groups.see(name, x)

    tokens = torch.arange(_TOKENS)[None] % model.vocabulary
    try:
        with watched(model.linears, see):
            model.model.base_model(input_ids=to_device(tokens, model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return groups.input_of, extras


def _set_width(config: Any, width: int, neurons: int) -> None:
    for name in _WIDTHS:
        if hasattr(config, name):
            setattr(config, name, neurons)
            return
    raise ModelError(
        f"a configuration of type {config.model_type} has no field for the width of its FFNs, "
        f"which is {width}, so no other can be stored. Cut layers or query heads instead."
    )


def _set_heads(config: Any, heads: tuple[int, int, int], query_heads: int) -> None:
    count, key_value_heads, head_dim = heads
    step = 1 if count == key_value_heads else key_value_heads
    if not step <= query_heads <= count or query_heads % step:
        raise InvalidInput(
            f"query_heads={query_heads} does not fit {count} query heads on {key_value_heads} keys "
            "and values: as many stay for each of these, at least one. Give "
            f"{', '.join(str(n) for n in range(step, count + 1, step))}."
        )
    config.num_attention_heads = query_heads
    if count == key_value_heads and hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = query_heads
    config.head_dim = head_dim  # or it would grow; whoever does not read it is found out


def _set_layers(config: Any, count: int, kept: Sequence[int]) -> None:
    config.num_hidden_layers = len(kept)
    for name, value in vars(config).items():  # layer_types, no_rope_layers: an entry a block
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[index] for index in kept])


def _built(model: LanguageModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights of a configuration that can be stored and read again."""
    try:
        type(config).from_dict(config.to_dict())
        with torch.device("meta"):
            twin: PreTrainedModel = type(model.model)(config)
    except Exception as error:  # each configuration has its own rules, and raises what it likes
        raise InvalidInput(
            f"transformers cannot load {model.name} with these sizes: {_first_line(error)} Give "
            "others, such as a number of heads that divides the hidden size."
        ) from error
    unfuse_experts(twin)
    twin.eval()
    return twin


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") + "."


def _check_twin(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    shapes: Mapping[int, torch.Size],
    kept: Sequence[int],
    *,
    sized: bool,
) -> None:
    """See that a model of other sizes differs in nothing but what is cut."""
    blocks, twins = decoder_blocks(model), decoder_blocks(twin)
    pairs = [(*blocks[index], twins[place][1], index, place) for place, index in enumerate(kept)]
    for name, block, of_twin, index, place in pairs:
        wanted = {key: shapes.get(id(p), p.shape) for key, p in block.named_parameters()}
        actual = {key: p.shape for key, p in of_twin.named_parameters()}
        for key in wanted.keys() | actual.keys():
            if wanted.get(key) != actual.get(key):
                raise ModelError(
                    f"{name}.{key} would be {_size(actual.get(key))} in a model of these sizes, "
                    f"and {_size(wanted.get(key))} after the cut: its configuration cannot say "
                    "what is cut. Cut something else: neurons, query heads or layers."
                )
        for key, before, after in _differences(block, of_twin):
            whole = type(before) is int and type(after) is int
            if not (whole and (sized or (before, after) == (index, place))):
                raise ModelError(
                    f"{name}.{key} is {before!r}, but would be {after!r} in a model of these "
                    "sizes: its configuration cannot keep what the block computes. Cut something "
                    "else: neurons, query heads or other layers."
                )


def _size(shape: torch.Size | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def _differences(module: nn.Module, twin: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Plain attributes of a module and all inside that its twin has another value for."""
    for (name, part), (_, of_twin) in zip(
        module.named_modules(), twin.named_modules(), strict=True
    ):
        for key, value in vars(of_twin).items():
            before = vars(part).get(key)
            if not key.startswith("_") and isinstance(value, _PLAIN) and before != value:
                yield f"{name}.{key}".lstrip("."), before, value


def _adopt_(module: nn.Module, twin: nn.Module) -> None:
    """Take over the sizes and places that a twin has."""
    for path, _, value in [*_differences(module, twin)]:
        name, _, key = path.rpartition(".")
        setattr(module.get_submodule(name), key, value)


def cut_(
    model: PreTrainedModel,
    twin: PreTrainedModel,
    part: Part,
    kept: Tensor,
    weight: Tensor | None = None,
) -> None:
    """Take neurons or heads out of a block; the reader's weight may be another, (out, columns)."""
    columns = part.columns(kept)
    reader = part.reader
    if weight is None:
        weight = reader.weight[:, columns.to(reader.weight.device)]
    _replace_(reader.module, "weight", weight.T if reader.transposed else weight)
    for writer in part.writers:
        rows = columns.to(writer.weight.device)
        rows_kept = writer.weight[rows]
        _replace_(writer.module, "weight", rows_kept.T if writer.transposed else rows_kept)
        if isinstance(bias := writer.module.bias, Tensor):
            _replace_(writer.module, "bias", bias.detach()[rows])
    parent, _, _ = reader.name.rpartition(".")
    _adopt_(model.get_submodule(parent), twin.get_submodule(parent))


def _replace_(module: nn.Module, name: str, values: Tensor) -> None:
    old = module.get_parameter(name)
    values = values.to(old.device, old.dtype).clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(values, requires_grad=old.requires_grad))


def keep_layers_(model: PreTrainedModel, twin: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave only the blocks of these indices in a model, and renumber them."""
    blocks = decoder_blocks(model)
    places = {name.rpartition(".")[0] for name, _ in blocks}
    if len(places) > 1:
        raise ModelError(
            f"{type(model).__name__} has blocks in {len(places)} lists, {', '.join(sorted(places))}"
            ": which follows which is not known. Cut neurons or query heads instead."
        )
    parent, _, name = places.pop().rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks[i][1] for i in kept))
    for (_, block), (_, of_twin) in zip(decoder_blocks(model), decoder_blocks(twin), strict=True):
        _adopt_(block, of_twin)
    take_sizes_(model, twin)


def take_sizes_(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Give a model, and all parts that know its configuration, that of its twin."""
    config, of_twin = model.config, twin.config
    vars(config.get_text_config()).update(vars(of_twin.get_text_config()))


def as_cut(model: LanguageModel) -> LanguageModel:
    """The same model with the linears that it has by now."""
    return replace(model, linears=prunable_linears(model.model))


def block_shapes(anatomy: Anatomy, *, multiple: int | None = None) -> BlockShapes:
    """Say what can be cut out of a model; nothing is tried out but whether it could be loaded."""
    first = next(iter(anatomy.blocks))
    model = anatomy.model
    width = neuron_weights = 0
    try:
        neurons = anatomy.neurons(first)
        anatomy.resized(neurons.count, None)
        width, neuron_weights = neurons.count, neurons.weights
    except ModelError as error:
        logger.info("neurons cannot be cut", extra={"model": model.name, "reason": str(error)})
    count, key_value_heads, _ = anatomy.heads
    choices, head_weights = [count], 0
    step = 1 if count == key_value_heads else key_value_heads
    for heads in range(count - step, 0, -step):
        try:
            anatomy.resized(None, heads)
        except InvalidInput:
            continue  # no number of heads that it could be loaded with
        except ModelError as error:
            logger.info("heads cannot be cut", extra={"model": model.name, "reason": str(error)})
            break
        choices.append(heads)
        head_weights = anatomy.query_heads(first).weights
    weights = sum(linear.weight.numel() for linear in model.linears.values())
    return BlockShapes(
        layers=len(anatomy.blocks),
        layer_weights=weights // len(anatomy.blocks),
        width=width,
        multiple=multiple or usual_multiple(width or 1),
        neuron_weights=neuron_weights,
        query_heads=tuple(choices),
        head_weights=head_weights,
        parameters=model.parameters,
    )
