"""
A small LLaMA, trained from random weights in seconds or minutes: where models are few.

Its vocabulary is small, so that its blocks do the work: with the 49,152 tokens of SmolLM2 such a
model learned word frequencies alone, and pruning half of it changed nothing.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from pho_service.models.texts import SEPARATOR, TextSource, read_documents
from pho_service.progress import Progress, silent

VOCABULARY = 512
HEADS = 4
LAST = 20  # steps that the final loss is the mean of: that of one is of a few windows only


@dataclass(frozen=True, kw_only=True)
class SmallLlama:
    """
    What is trained, and how.

    Attributes:
        hidden: Width of the blocks.
        intermediate: Width of their MLPs.
        blocks: How many.
        batch: Windows of a step.
        learning_rate: Learning rate of AdamW, at its highest.
    """

    hidden: int = 128
    intermediate: int = 384
    blocks: int = 4
    batch: int = 2
    learning_rate: float = 3e-3


# Of `pho example --small`: 86,208 weights, which learn enough in some seconds.
EXAMPLE = SmallLlama(hidden=64, intermediate=192, blocks=1, batch=8, learning_rate=2e-2)
EXAMPLE_STEPS = 300
EXAMPLE_CONTEXT = 128


@dataclass(frozen=True, kw_only=True)
class Training:
    """
    A trained model, and what the training took.

    Attributes:
        folder: Folder of the model and its tokenizer, as Hugging Face stores them.
        parameters: All weights, embeddings included; the head's are the same.
        steps: Number of steps of the optimiser.
        tokens: Tokens of the text.
        seconds: Duration of all steps.
        loss: In nats, on the text that it was trained on, at the end.
    """

    folder: Path
    parameters: int
    steps: int
    tokens: int
    seconds: float
    loss: float


def train_small_model(
    source: TextSource,
    folder: Path,
    *,
    steps: int,
    context_length: int,
    seed: int,
    shape: SmallLlama = SmallLlama(),
    progress: Progress = silent,
) -> Training:
    """
    Make a LLaMA and its tokenizer, train both on a text, and save them.

    The number of steps is fixed, not the time: the same steps give the same model.

    Args:
        source: What it learns, and all that it ever sees.
        folder: For the model.
        steps: Number of steps of AdamW.
        context_length: Tokens of a window, and the most that it can read.
        seed: Seed of the weights and of the windows.
        shape: Shape of the model and of a step.
        progress: Is told of the steps.
    """
    documents = list(read_documents(source))
    tokenizer = _tokenizer(documents)
    text = torch.tensor(tokenizer(SEPARATOR.join(documents), verbose=False).input_ids)
    model: Any = _random_model(shape, len(tokenizer), context_length, seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    started = time.perf_counter()
    with progress("Training a small LLaMA", steps) as advance:
        for _ in range(steps):
            windows = _batch(text, shape.batch, context_length, generator)
            loss = model(input_ids=windows, labels=windows, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            advance(1)
    seconds = time.perf_counter() - started
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Training(
        folder=folder,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=steps,
        tokens=len(text),
        seconds=round(seconds, 1),
        loss=round(sum(losses[-LAST:]) / len(losses[-LAST:]), 3),
    )


def _tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of a text; without BOS."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")  # noqa: S106


def _random_model(
    shape: SmallLlama, vocabulary: int, context_length: int, seed: int
) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=context_length, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _batch(text: Tensor, count: int, context_length: int, generator: torch.Generator) -> Tensor:
    """(count, context_length), int64: windows from anywhere in the text."""
    starts = torch.randint(len(text) - context_length + 1, (count,), generator=generator)
    return torch.stack([text[start : start + context_length] for start in starts.tolist()])
