"""What goes wrong with the machine is told in words, and by what it asks for."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from pho_service.errors import DeviceLost, InvalidInput, ModelError, OutOfMemory
from pho_service.host.machine import faults_told

CUDA = (
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in "
    "https://docs.nvidia.com for more information.\nCUDA kernel errors might be asynchronously "
    "reported at some other API call, so the stacktrace below might be incorrect."
)
FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.06 GiB is free. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (torch.OutOfMemoryError(FULL), OutOfMemory, "79.11 GiB of which 1.06 GiB is free. Use a"),
        (RuntimeError("CUDA error: out of memory"), OutOfMemory, "memory ran out: CUDA error"),
        (MemoryError(), OutOfMemory, "memory ran out. Use a smaller model"),
        (torch.AcceleratorError(CUDA), DeviceLost, "illegal memory access was encountered. A new"),
        (RuntimeError(CUDA), DeviceLost, "the GPU failed: CUDA error"),
    ],
)
def test_each_kind_has_its_own_error(error, kind, words):
    with pytest.raises(kind) as told, faults_told():
        raise error

    assert words in str(told.value)
    assert "PYTORCH_ALLOC_CONF" not in str(told.value)
    assert "stacktrace" not in str(told.value)


def test_what_torch_really_raises_on_a_cpu_as_runtimeerror_is_memory_that_ran_out():
    with pytest.raises(OutOfMemory, match="allocate 4000000000000000 bytes"), faults_told():
        torch.empty(10**15)


def test_a_panic_of_tokenizers_is_an_error_of_the_model():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("((a+)+)+z"), "isolated")

    with pytest.raises(ModelError, match=r"panic.*retry-limit.*tokenizer\.json"), faults_told():
        tokenizer.encode("a" * 100)


@pytest.mark.parametrize("error", [InvalidInput("x"), ValueError("x"), KeyboardInterrupt()])
def test_what_is_no_fault_of_the_machine_goes_on_as_it_is(error):
    with pytest.raises(type(error)) as raised, faults_told():
        raise error

    assert raised.value is error
