"""Models, texts and bundles on disk: the only code that reads weights."""
