"""What is written down in `planning`, which imports nothing of torch, is what is done."""

from pho_service.planning.stage_memory import HEAD_TOKENS, LOGITS_AT_ONCE
from pho_service.pruning import perplexity


def test_constants_are_those_of_the_passes() -> None:
    """Tokens and logits that are taken at a time."""
    assert HEAD_TOKENS == perplexity.HEAD_TOKENS
    assert LOGITS_AT_ONCE == perplexity.CHUNK
