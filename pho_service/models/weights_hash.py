"""
Hashes of weights, made by all cores: hashlib lets other threads run while it reads.

A GPU's tensors are copied in pieces into pinned memory, so a hash takes some
megabytes for each thread, whatever the size of the model.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from pho_service.models.experts import separate_weights

PIECE = 2**25  # bytes that are copied from a GPU at a time, by each thread
MOST_THREADS = 32  # a GPU's link is full long before


def weights_sha256(
    model: nn.Module,
    *,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """
    Hash a model's weights: every parameter's name, shape, dtype and bytes.

    It is the SHA-256 of a line for each tensor, in the order of their names:
    name, shape, dtype and the SHA-256 of its bytes. In fused experts each
    matrix is a tensor, so it does not matter how they lie in memory.

    Args:
        model: Its parameters may lie anywhere; shared ones count once.
        threads: The hash is the same with any number; None takes torch's number.
        dtype: Hash every parameter as if it were of this type; None leaves them as they are.
    """
    tensors = dict(sorted(separate_weights(model).items()))
    hashes = sha256_each(tensors.values(), threads=threads, dtype=dtype)
    digest = hashlib.sha256()
    for (name, tensor), each in zip(tensors.items(), hashes, strict=True):
        digest.update(f"{name} {tuple(tensor.shape)} {dtype or tensor.dtype} {each}\n".encode())
    return digest.hexdigest()


def sha256_each(
    tensors: Iterable[Tensor], *, threads: int | None = None, dtype: torch.dtype | None = None
) -> Iterator[str]:
    """
    The SHA-256 of each tensor's bytes in its dtype, the last dimension's neighbours first.

    Args:
        tensors: On any device.
        threads: That share the work; None takes torch's number.
        dtype: To cast each to before; None leaves them as they are.
    """
    with ThreadPoolExecutor(min(threads or torch.get_num_threads(), MOST_THREADS)) as pool:
        yield from pool.map(partial(_sha256, dtype=dtype), tensors)


def _sha256(tensor: Tensor, dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    _update(digest, tensor if dtype is None else tensor.to(dtype))
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Feed a tensor's bytes to a hash."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.device.type == "cpu":
        digest.update(data.numpy().data)
        return
    with torch.cuda.device(data.device):
        buffer = torch.empty(min(PIECE, len(data)), dtype=torch.uint8, pin_memory=True)
        for piece in data.split(PIECE):
            copied = buffer[: len(piece)].copy_(piece, non_blocking=True)
            torch.cuda.current_stream().synchronize()
            digest.update(copied.numpy().data)
