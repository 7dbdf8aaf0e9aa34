"""Scores, masks, statistics, the proxy and perplexity: tensors in, tensors out, no files."""
