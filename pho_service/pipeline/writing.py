"""
How models go on with a text: what the dense and the pruned one write, token by token the likeliest.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from pho_service.errors import InvalidInput, ModelError, field_name, shown
from pho_service.models.loading import LanguageModel
from pho_service.spec.configuration import MOST_CHARACTERS, NEW_TOKENS, Continuation
from pho_service.spec.pattern import SECONDS

PROMPTS = 3  # beginnings of windows of the text of a confirmation
PROMPT_TOKENS = 32  # of each


def side_by_side(
    model: LanguageModel, windows: Tensor | None, **sides: Mapping[str, Any]
) -> list[Continuation]:
    """What :func:`written_by` gave of models, by their names, after each prompt."""
    prompts = prompts_of(model, windows)
    if prompts is None or not all(sides.values()):
        return []
    rows = zip(texts_of(model, prompts), *(side["written"] for side in sides.values()), strict=True)
    names = ("prompt", *sides)
    return [Continuation(**dict(zip(names, row, strict=True))) for row in rows]


def prompts_of(model: LanguageModel, windows: Tensor | None) -> Tensor | None:
    """(prompts, tokens), from all over a text; None for a streamed model or without a tokenizer."""
    if windows is None or model.stream or model.tokenizer is None:
        return None
    return beginnings(windows)[:, : (model.longest or 2 * PROMPT_TOKENS) // 2]


def beginnings(windows: Tensor) -> Tensor:
    """The first tokens of windows that are spread evenly."""
    places = {(2 * each + 1) * len(windows) // (2 * PROMPTS) for each in range(PROMPTS)}
    return windows[sorted(places), :PROMPT_TOKENS]


def written_by(model: LanguageModel, windows: Tensor | None) -> dict[str, Any]:
    """What the model, as it is now, writes after each of the prompts."""
    prompts = prompts_of(model, windows)
    return {} if prompts is None else {"written": continued(model, prompts, NEW_TOKENS)}


def continued(model: LanguageModel, prompts: Tensor, tokens: int) -> list[str]:
    """The likeliest next tokens of each prompt, at most as many as there is room for, as text."""
    length = prompts.shape[1]
    room = tokens if model.longest is None else min(tokens, model.longest - length)
    network: Any = model.model
    end = network.generation_config.eos_token_id
    with torch.inference_mode():
        generated = network.generate(
            prompts.to(model.device),
            attention_mask=torch.ones_like(prompts).to(model.device),
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=end[0] if isinstance(end, list) else end or 0,
        )
    return texts_of(model, generated[:, length:])


DECODED_S = 10 * SECONDS  # that a decoder may take, also on a busy machine
TOKEN = MOST_CHARACTERS // NEW_TOKENS  # characters of a token, in the mean of a text


def texts_of(model: LanguageModel, tokens: Tensor) -> list[str]:
    """
    Rows of tokens as texts without what cannot be printed, but for the ends of lines. They end
    where they have more characters than such tokens have.
    """
    decoded: Future[list[str]] = Future()

    def decode() -> None:
        try:
            rows = (
                model.tokenizer.decode(row, skip_special_tokens=True)[: TOKEN * len(row)]
                for row in tokens.tolist()
            )
            decoded.set_result([*rows])
        except BaseException as error:
            decoded.set_exception(error)

    # Its regular expressions are run by a library that nobody can stop; it holds no other thread.
    threading.Thread(target=decode, daemon=True).start()
    try:
        texts = decoded.result(DECODED_S)
    except TimeoutError as error:
        raise ModelError(
            f"the tokenizer of {model.name} takes more than {DECODED_S:g} s to turn "
            f"{tokens.numel()} tokens into text. See the regular expressions of its decoder, in "
            "tokenizer.json."
        ) from error
    return ["".join(c if c.isprintable() or c == "\n" else " " for c in text) for text in texts]


def write(model: LanguageModel, prompts: Sequence[str], tokens: int) -> list[str]:
    """What a model writes after each prompt, which begins as the model's texts do."""
    cut = []
    for prompt in prompts:
        if not prompt.strip():
            raise InvalidInput("a prompt is empty. Give it a word to go on from.")
        begin = torch.tensor(model.window_prefix("auto"), dtype=torch.long)
        cut.append(torch.cat([begin, model.tokenize(prompt)]))
        needed = len(cut[-1]) + tokens
        if model.longest is not None and needed > model.longest:
            raise InvalidInput(
                f"the prompt {shown(prompt, 30)!r} has {len(cut[-1])} tokens, which is {needed} "
                f"with {field_name('tokens', tokens)}, but {model.name} reads {model.longest}. "
                "Shorten the prompt, or write fewer tokens."
            )
    return [continued(model, prompt[None], tokens)[0] for prompt in cut]
