"""
The parts of a job that `make bench-gpu` measures, and what it checks beside.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pho_service.models.loading import LanguageModel, given_model
from pho_service.models.texts import GivenWindows, RecoveryText
from pho_service.pipeline.recover import PrunedModel, recover_model
from pho_service.pruning.bundle import ProxyBundle
from pho_service.pruning.hardware import peak_memory
from pho_service.pruning.masks import linear_masks
from pho_service.pruning.proxy import ProxyEvaluator
from pho_service.pruning.statistics import PrunableLinear
from pho_service.spec.pattern import Pattern
from pho_service.spec.recovery import TRAINS, Recovery
from pho_service.spec.space import SearchSpace
from pho_service.spec.steps import Candidate
from pho_service.tuning.validation import random_candidates

T = TypeVar("T")
PATTERNS = (("0.5", "row"), ("0.5", "layer"), ("0.5", "global"), ("2:4", None))


@dataclass(frozen=True, kw_only=True)
class Part:
    """
    Attributes:
        title: What was done.
        seconds: It took, on the clock.
        tokens: That the model was run over; None where that is not the measure.
        allocated: Peak bytes of the card that tensors took; None without one.
        reserved: The same that torch held.
        main: Peak bytes of main memory of this process; None where the system does not tell.
        times: How often the part stands in the whole model, for shapes of a few blocks.
    """

    title: str
    seconds: float
    tokens: int | None
    allocated: int | None
    reserved: int | None
    main: int | None
    times: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times parts, and watches the memory of the card and of the host in each."""

    device: torch.device
    parts: list[Part] = field(default_factory=list)

    def part(
        self, title: str, work: Callable[[], T], *, tokens: int | None = None, times: float = 1.0
    ) -> T:
        """Do a part of the whole."""
        on_card = self.device.type == "cuda"
        if on_card:
            torch.cuda.reset_peak_memory_stats(self.device)
        with peak_memory(torch.device("cpu")) as main:
            started = time.perf_counter()
            result = work()
            if on_card:
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - started
        self.parts.append(
            Part(
                title=title,
                seconds=seconds,
                tokens=tokens,
                allocated=torch.cuda.max_memory_allocated(self.device) if on_card else None,
                reserved=torch.cuda.max_memory_reserved(self.device) if on_card else None,
                main=main(),
                times=times,
            )
        )
        return result

    def to_list(self) -> list[dict[str, Any]]:
        """The parts as JSON values."""
        return [asdict(part) for part in self.parts]


def some_candidates(bundle: ProxyBundle, *, seed: int) -> list[Candidate]:
    """A few random candidates of every kind of pattern."""
    space = SearchSpace(kernel_sizes=bundle.kernel_sizes)
    parsed = [Pattern.parse(*pattern) for pattern in PATTERNS]
    return [
        candidate
        for pattern in parsed
        for candidate in random_candidates(space.fitted(pattern), pattern, count=4, seed=seed)
    ]


def ratings_apart(bundle: ProxyBundle, device: torch.device, *, seed: int) -> float:
    """The largest relative difference between a candidate's ratings on the device and the CPU."""
    candidates = some_candidates(bundle, seed=seed)
    here = ProxyEvaluator(bundle, device).evaluate(candidates)
    there = ProxyEvaluator(bundle, "cpu").evaluate(candidates)
    return max(abs(a.blend - b.blend) / abs(b.blend) for a, b in zip(here, there, strict=True))


def masks_apart(
    model: LanguageModel, bundle: ProxyBundle, *, linears: int, seed: int
) -> tuple[int, int]:
    """
    Bits of masks that differ between the device and the CPU, and how many were compared.

    Args:
        model: Dense; some of its linears are copied.
        bundle: Of it.
        linears: How many, from the first block on.
        seed: Of the candidates.
    """
    chosen = dict(list(model.linears.items())[:linears])
    copies = {
        name: PrunableLinear(name=name, module=_Weight(linear.weight.cpu()))
        for name, linear in chosen.items()
    }
    known = bundle.statistics()
    differing = compared = 0
    for candidate in some_candidates(bundle, seed=seed):
        if candidate.pattern.scope.value == "global":
            continue  # its shares are of all linears
        for (_, here), (_, there) in zip(
            linear_masks(chosen, known, candidate), linear_masks(copies, known, candidate),
            strict=True,
        ):  # fmt: skip
            differing += int((here.keep.cpu() != there.keep).sum())
            compared += there.keep.numel()
    return differing, compared


class _Weight(nn.Module):
    """A linear's weight, elsewhere."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def bundle_tensors(bundle: ProxyBundle) -> Iterator[tuple[str, Tensor]]:
    """All statistics of a bundle by name."""
    for number, entry in enumerate(bundle.inputs):
        yield f"norm {number}", entry.activation_norm
        yield f"root {number}", entry.root
    for layer in bundle.layers:
        yield f"fisher {layer.name}", layer.fisher


def recovery_gains(device: torch.device, folder: Path, *, seed: int) -> dict[str, float]:
    """
    What recoveries of a small model leave of its divergence, as a share, by what is trained: on the
    device, where products are in bfloat16, and on the CPU.
    """
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = LlamaForCausalLM(config).state_dict()
        windows = torch.randint(256, (96, 64))
    text = RecoveryText(source=GivenWindows(tokens=windows), context_length=64, bos="never")
    found = {}
    for train in TRAINS:
        for where, named in ((device, ""), (torch.device("cpu"), ", on the CPU")):
            dense, pruned = (LlamaForCausalLM(config).eval() for _ in range(2))
            for model in (dense, pruned):
                model.load_state_dict(weights)
                model.to(where)
            given = given_model(pruned)
            for linear in given.linears.values():
                linear.weight.masked_fill_(linear.weight.abs() < linear.weight.abs().median(), 0)
            recovered = recover_model(
                PrunedModel.of(given), lambda dense=dense: nullcontext(given_model(dense)), text,
                Recovery(tokens=2 * windows.numel(), train=train, rate=0.02, seed=seed),
                folder / f"{train} on {where.type}",
            )  # fmt: skip
            name = f"share of the divergence that training {train} leaves{named}"
            found[name] = recovered.after / recovered.before
    return found


def tensors_apart(a: ProxyBundle, b: ProxyBundle) -> tuple[int, int]:
    """How many of two bundles' tensors differ in any bit, and how many there are."""
    pairs = list(zip(bundle_tensors(a), bundle_tensors(b), strict=True))
    return sum(not torch.equal(x, y) for (_, x), (_, y) in pairs), len(pairs)


def statistics_apart(a: ProxyBundle, b: ProxyBundle) -> dict[str, float]:
    """Median and largest relative difference of norms and Fisher weights, elementwise."""
    found = {}
    for kind in ("norm", "fisher"):
        apart: list[Tensor] = []
        for (name, x), (_, y) in zip(bundle_tensors(a), bundle_tensors(b), strict=True):
            if name.startswith(kind):
                apart.append(((x - y).abs() / y.abs().clamp_min(1e-30)).flatten())
        every = torch.cat(apart)
        found[f"{kind}, median"] = float(every.median())
        found[f"{kind}, largest"] = float(every.max())
    return found
