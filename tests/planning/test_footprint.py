"""What is written down in `planning`, which imports nothing of torch, is what is done."""

from pho_service.planning.stage_memory import HEAD_TOKENS, LOGITS_AT_ONCE
from pho_service.pruning import perplexity


def test_tokens_and_logits_that_are_taken_at_a_time() -> None:
    assert HEAD_TOKENS == perplexity.HEAD_TOKENS
    assert LOGITS_AT_ONCE == perplexity.CHUNK
