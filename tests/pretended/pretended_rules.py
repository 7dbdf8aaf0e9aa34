"""
CUDA's own rules for each operation: what may be mixed, what launches, what makes the CPU wait.

From ATen: ``TensorIterator.cpp`` (a 0-dim tensor of the CPU may stand beside CUDA tensors in
pointwise operations, one of them, never as the output), ``TensorAdvancedIndexing.cpp`` (``index``
takes indices of the CPU or of the tensor's device, ``index_put_`` moves whatever it gets),
``TensorCompare.cpp`` (``where``), ``native/cuda`` (what reads sizes back).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# They need a number or a size from the card before they can return.
WAITING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "histc", "repeat_interleave",
    "_linalg_check_errors", "_linalg_eigh", "linalg_eig", "_linalg_svd", "linalg_lstsq",
    "multinomial", "_assert_scalar",
}  # fmt: skip
# They reserve memory or describe it anew, and no kernel runs.
SILENT = {
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted",
    "_unsafe_view", "_reshape_alias", "set_", "resize_", "lift", "lift_fresh",
    "_local_scalar_dense", "_linalg_check_errors", "record_stream", "is_pinned",
    "_assert_tensor_metadata",
}  # fmt: skip
# Not tagged as pointwise, but they take a number from the CPU as if it were one.
TAKES_SCALARS = {"masked_fill", "masked_fill_", "where", "fill", "fill_"}
INDEXING = {"index", "_unsafe_index"}
INDEX_WRITING = {"index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
COPYING = {"copy_", "_copy_from", "copy"}


@dataclass(frozen=True)
class Rule:
    """What CUDA does with one operation."""

    name: str  # without namespace and overload
    pointwise: bool  # a 0-dim tensor of the CPU may be among its inputs
    view: bool  # it describes the same memory anew
    launches: bool
    waits: bool
    moves: bool  # it takes tensors of several devices, by rules of its own
    composite: bool  # it is made of others, which in inference mode are not seen by themselves
    written: frozenset[int | str]  # arguments that it changes, by position and name


@cache
def rule_of(operation):
    schema = operation._schema
    name = schema.name.rpartition("::")[2]
    written = set()
    for number, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {number, argument.name}
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return Rule(
        name=name,
        pointwise=torch.Tag.pointwise in operation.tags or name in TAKES_SCALARS,
        view=view,
        launches=not view and name not in SILENT,
        waits=name in WAITING,
        moves=name in COPYING | INDEXING | INDEX_WRITING,
        composite=torch._C._dispatch_has_kernel_for_dispatch_key(
            operation.name(), "CompositeImplicitAutograd"
        ),
        written=frozenset(written),
    )


def tensors_of(value):
    """The tensors among arguments or results, also in lists."""
    found = []
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for each in value:
            if isinstance(each, Tensor):
                found.append(each)
            elif isinstance(each, (list, tuple)):
                found += tensors_of(each)
    elif isinstance(value, dict):
        found += tensors_of(list(value.values()))
    return found


def mixed(rule, devices):
    names = ", ".join(sorted(map(str, devices)))
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {names}! "
        f"(when checking arguments of {rule.name}, pretended)"
    )
