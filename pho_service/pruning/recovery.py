"""
Recovery: train what a pruned model keeps towards what the dense model predicts, masks fixed.
"""

import copy
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parametrize

from pho_service.errors import InvalidInput
from pho_service.host.machine import let_go_of_memory, ran_out_of_memory
from pho_service.pruning.hardware import quick_products
from pho_service.pruning.perplexity import DenseReference, frozen, recomputed, window_backward
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.recovery import RANK, Recovery

logger = logging.getLogger(__name__)

LEAST_SIZE = 1e-3  # so that biases of zero have a rate, too
_IN_HALVES = ("cuda",)
_LONGEST = 1.0  # norm of all gradients together, above which they are made shorter
_PATIENCE = timedelta(days=1)  # of a process for the others: whoever ends, ends them all


class Processes:
    """
    The processes of `torchrun` or `accelerate launch` that train one model together: this one, and
    how many there are. One by itself if it was started by neither.
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.number = int(os.environ.get("RANK", "0")) if self.count > 1 else 0
        if self.count == 1 or dist.is_initialized():
            return
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
        if missing:
            raise InvalidInput(
                f"WORLD_SIZE is {self.count}, so this is one of several processes, but "
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set. Start "
                "them by torchrun or accelerate launch, or unset WORLD_SIZE."
            )
        # Loaders would leave weights out in all processes but the first.
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        if torch.cuda.is_available():
            torch.cuda.set_device(self.device)
        dist.init_process_group(timeout=_PATIENCE)

    @property
    def device(self) -> torch.device:
        """Where this process computes, if it is one of several."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))

    def agreed(self, value: Any) -> Any:
        """Give all processes the value of the first one."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def every(self, value: Any) -> list[Any]:
        """Give all processes the value of each of them, in their order."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        self.every(None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, a trainer takes this process for the only one: it trains what lies here."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        variables = {name: os.environ.pop(name) for name in names if name in os.environ}
        for name in ("training_args", "trainer_utils"):  # which wonder at that
            logging.getLogger(f"transformers.{name}").setLevel(logging.ERROR)
        try:
            yield
        finally:
            os.environ.update(variables)

    @contextmanager
    def sharing(
        self, model: nn.Module, blocks: Sequence[nn.Module], trained: Sequence[nn.Parameter]
    ) -> Iterator[tuple[nn.Module, list[nn.Module], list[nn.Parameter]]]:
        """
        Inside, the weights lie in a copy of the model that these processes share: of each block,
        and of what else is trained, each holds a part. After it, all hold the whole model.

        Source:
            Zhao et al. 2023, arXiv:2304.11277 (FSDP), by torch's ``fully_shard``.
        """
        parameters, trained_ids = dict(model.named_parameters()), {id(p) for p in trained}
        block_ids = {id(parameter) for block in blocks for parameter in block.parameters()}
        outside = [
            module
            for module in model.modules()
            if any(id(p) in trained_ids - block_ids for p in module.parameters(recurse=False))
        ]
        copied = copy.deepcopy(
            model, {id(tensor): tensor for tensor in [*parameters.values(), *model.buffers()]}
        )
        twin = dict(zip(model.modules(), copied.modules(), strict=True))
        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in (*blocks, *outside):
            share = fully_shard(twin[module].float(), mesh=mesh, reshard_after_forward=True)
            share.unshard()  # or the first time in inference mode would forbid gradients
            share.reshard()
        shared = dict(copied.to(self.device).named_parameters())
        for name, parameter in parameters.items():
            if isinstance(shared[name], DTensor):
                parameter.data = parameter.data.new_zeros(()).expand_as(parameter)  # no memory
        yield (
            copied,
            [twin[block] for block in blocks],
            [shared[name] for name, p in parameters.items() if id(p) in trained_ids],
        )
        for name, parameter in parameters.items():
            if isinstance(shared[name], DTensor):
                parameter.data = _whole(shared[name].detach()).cpu()


class Recovering(nn.Module):
    """
    What is trained of a pruned model: as a module it has those parameters alone, in float32, and of
    a model that is shared by processes what lies here.
    """

    zeros_stay = True  # Of what is trained, what is zero was removed

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        trained: Sequence[nn.Parameter],
        processes: Processes,
    ) -> None:
        super().__init__()
        self.processes = processes
        self.recompute = True  # blocks keep only their inputs for the backward pass, and run again
        self.trained = nn.ParameterList([_here(parameter) for parameter in trained])
        self._model = (model, [*blocks], [*trained])  # not as modules of this one

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        return self._model[0]

    @property
    def device(self) -> torch.device:
        """Device of the parameters that are trained, or of the first of them."""
        return next(self.parameters()).device

    @property
    def hf_device_map(self) -> dict[str, torch.device]:
        """For a trainer: all of it stays where it is, on several devices if it is there."""
        return {f"{number}": parameter.device for number, parameter in enumerate(self.trained)}

    def groups(self, rate: float) -> list[dict[str, object]]:
        """Each parameter, with a learning rate that is a share of its size."""
        # Adam moves every weight by about its rate, however large weights are: models differ.
        sizes = [_size(_whole(parameter.detach())) for parameter in self._model[2]]
        return [
            {"params": [parameter], "lr": rate * size}
            for parameter, size in zip(self.trained, sizes, strict=True)
        ]

    def backward(self, reference: DenseReference, window: int) -> float:
        """
        Add the gradients of the divergence of one window to those of the trained parameters; of
        several processes, their mean.

        Weights that were removed have none: what is zero stays zero. Where memory runs out, blocks
        are run again from then on.

        Returns:
            The mean over its predicted tokens, in nats: see
            :func:`~pho_service.pruning.perplexity.rate_divergence`.
        """
        try:
            return self._backward(reference, window)
        except Exception as error:
            if self.recompute or not ran_out_of_memory(error):
                raise
            logger.warning("memory ran out: blocks run again for the backward pass from here on")
        # After the error, which holds on to what was computed.
        self.recompute = True
        for parameter in self._model[2]:
            parameter.grad = None
        let_go_of_memory()
        return self._backward(reference, window)

    def _backward(self, reference: DenseReference, window: int) -> float:
        model, blocks, originals = self._model
        device = next(model.parameters()).device
        again = blocks if self.recompute else []
        with frozen(model), recomputed(again, nullcontext), mixed(device, gradients=True):
            for original in originals:
                original.requires_grad_(True)
            value = window_backward(model, reference, window)
        for parameter, original in zip(self.trained, originals, strict=True):
            if isinstance(original, DTensor):
                parameter.grad, original.grad = _here(original.grad), None
            if self.zeros_stay and parameter.grad is not None and parameter.dim() > 1:
                parameter.grad.mul_(parameter.detach().sign().abs_())
        return value

    def clip(self) -> None:
        """Make all gradients together no longer than 1."""
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if self.processes.count > 1:
            norm = norm.square()
            dist.all_reduce(norm)
            norm = norm.sqrt()
        clip_grads_with_norm_(self.trained, _LONGEST, norm)

    def round_(self, dtype: torch.dtype, seed: int = 0) -> None:
        """
        Round the weights as they will be stored, so that what is measured is what is saved.

        At random, up or down: the nearest would be the weight from before wherever a training has
        changed it by less than half a step of its type.
        """
        for number, parameter in enumerate(self.trained):
            weights = parameter.data
            weights = weights.to_local() if isinstance(weights, DTensor) else weights
            weights.copy_(rounded_at_random(weights, dtype, seed + number))


_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # the last ones of a float32


def rounded_at_random(weights: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """
    Round to one of the two nearest values of a type, such that the mean is exact.

    Args:
        weights: Any shape, float32 to be rounded so; others are rounded to the nearest.
        dtype: Type of the result. bfloat16 and float16 are rounded to at random, but for what is
            below the normal numbers of float16.
        seed: Seed of the random choice, which is the same on every device.

    Returns:
        As ``weights``, in ``dtype``. Zeros stay zeros.

    Source:
        Gupta et al. 2015, arXiv:1502.02551 (stochastic rounding).
    """
    dropped = _DROPPED_BITS.get(dtype)
    if dropped is None or weights.dtype is not torch.float32:
        return weights.to(dtype)
    bits = weights.contiguous().view(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(1 << dropped, bits.shape, dtype=torch.int32, generator=generator)
    rounded = (bits + noise.to(bits.device)) & -(1 << dropped)
    return rounded.view(torch.float32).to(dtype)


def _size(weights: Tensor) -> float:
    """Root mean square of those that are not zero."""
    count = max(1, int(weights.count_nonzero()))
    return max(LEAST_SIZE, math.sqrt(float(weights.float().square().sum()) / count))


def mixed(device: torch.device, *, gradients: bool = False) -> AbstractContextManager[object]:
    """
    Products in bfloat16 whatever the weights are in: on a GPU, and for all that gradients come from
    on a CPU that has units for them. On others that is slower, and what decides is in float32.
    """
    if device.type in _IN_HALVES:
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # as there
    return quick_products(device) if gradients else nullcontext()


def _here(tensor: Any) -> Any:
    """A tensor as it is, or of one that processes share what lies here."""
    if not isinstance(tensor, DTensor):
        return tensor
    local = cast(Any, tensor.detach()).to_local()
    return nn.Parameter(local) if isinstance(tensor, nn.Parameter) else local


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def recovering(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    linears: Mapping[str, PrunableLinear],
    settings: Recovery,
    processes: Processes,
) -> Iterator[Recovering]:
    """Find what is trained of a model. After it, low-rank changes are merged into the weights."""
    weights = {id(linear.parameter) for linear in linears.values()}
    parameters = [*model.named_parameters()]
    with ExitStack() as stack:
        if settings.train == "lora":
            generator = torch.Generator().manual_seed(settings.seed)
            places = [name.rpartition(".")[::2] for name, p in parameters if id(p) in weights]
            modules = [(model.get_submodule(path), attribute) for path, attribute in places]
            for module, attribute in modules:
                change = MaskedLowRank(getattr(module, attribute).detach(), generator)
                parametrize.register_parametrization(module, attribute, change)
                stack.callback(parametrize.remove_parametrizations, module, attribute)
            trained = [parameter for change in _changes(model) for parameter in change.parameters()]
        else:
            norms = settings.train == "norms"
            trained = [p for _, p in parameters if (p.dim() == 1 if norms else id(p) in weights)]
            for parameter in trained:
                parameter.data = parameter.data.float()
        parts = (model, blocks, trained)
        if processes.count > 1:
            parts = stack.enter_context(processes.sharing(*parts))
        yield (_LowRank if settings.train == "lora" else Recovering)(*parts, processes)
        for change_here, shared in zip(_changes(model), _changes(parts[0]), strict=True):
            change_here.dtype = shared.dtype


def _changes(model: nn.Module) -> list["MaskedLowRank"]:
    return [module for module in model.modules() if isinstance(module, MaskedLowRank)]


class MaskedLowRank(nn.Module):
    """
    A weight plus the product of two thin matrices, where the weight is not zero.

    Source:
        PERP, Zimmer et al. 2023, arXiv:2312.15230 (MaskLoRA).
    """

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        right = _size(weight) * torch.randn(RANK, columns, generator=generator) / RANK**0.5
        self.left = nn.Parameter(torch.zeros(rows, RANK, device=weight.device))
        self.right = nn.Parameter(right.to(weight.device))
        self.dtype = weight.dtype  # That the sum is rounded to

    def forward(self, weight: Tensor) -> Tensor:
        """(rows, columns), as the weight."""
        change = (self.left @ self.right).to(weight.dtype)
        return (weight + change * (weight != 0)).to(self.dtype).to(weight.dtype)


class _LowRank(Recovering):
    """Low-rank changes, whose sums with the weights are rounded."""

    zeros_stay = False  # they begin as zeros, and the mask is in the sum

    def groups(self, rate: float) -> list[dict[str, object]]:
        """Rates with which each weight moves by about as much as if it was trained itself."""
        groups = Recovering.groups(self, rate)
        return [*({**group, "lr": rate} for group in groups[::2]), *groups[1::2]]

    def round_(self, dtype: torch.dtype, seed: int = 0) -> None:
        del seed  # the sum is rounded to the nearest, each time
        for change in _changes(self.model):
            change.dtype = dtype
