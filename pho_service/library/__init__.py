"""The library: configurations that were found before, and which of them fit a model."""
