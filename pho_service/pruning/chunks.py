"""How much of a matrix is worked on at a time: what stays in a CPU's caches, or fills a GPU."""

import torch

from pho_service.pruning.memory import free_memory

GPU_CHUNK = 1 << 28  # values: all rows of a linear of 4,096 x 16,384 where 4 are held for a weight
BYTES = 64  # of a GPU's free memory for each value; all temporaries of a chunk take 10 to 50


def chunk_size(device: torch.device, on_cpu: int) -> int:
    """
    Give the number of values of a temporary tensor.

    A GPU works on so many that a linear of a large model is one piece, for
    each piece costs the same hundreds of launches, whatever its height. Where
    its free memory is short, on a power of two that fits.

    Args:
        device: Where the tensor is.
        on_cpu: The answer for any device but a CUDA GPU, and the least for that.
    """
    if device.type != "cuda":
        return on_cpu
    fitting = max(1, free_memory(device) // BYTES)
    return max(on_cpu, min(GPU_CHUNK, 1 << fitting.bit_length() - 1))
