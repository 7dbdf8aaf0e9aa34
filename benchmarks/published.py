"""Perplexities that papers print, to be read beside our own."""

# Meng et al. 2024, arXiv:2406.07831 (ALPS), tables 11 to 17: WikiText-2, context 2048, 128 windows
# of C4, means of five runs. At 50 %, 60 %, 70 %, 2:4 and 4:8.
SOURCE = "ALPS paper, arXiv:2406.07831, tables 11-17"
PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
PERPLEXITIES = {
    "LLaMA-2-7B": {
        "wanda": (6.93, 10.82, 76.05, 12.10, 8.63),
        "dsnot": (6.94, 11.47, 63.12, 12.68, 8.88),
        "sparsegpt": (7.00, 10.19, 27.20, 10.94, 8.46),
        "alps": (6.85, 9.36, 19.31, 9.95, 8.12),
    },
    "LLaMA-3-8B": {
        "wanda": (9.87, 23.55, 116.8, 24.36, 14.52),
        "dsnot": (9.94, 23.05, 108.7, 23.09, 14.76),
        "sparsegpt": (9.47, 15.63, 43.15, 16.35, 12.40),
        "alps": (9.11, 14.09, 30.53, 14.82, 11.57),
    },
}


def published_rows(method: str, patterns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A row for each published model that has this method: its name, and a cell a pattern."""
    return [
        (
            f"  published, {model}",
            *(
                f"{row[method][PATTERNS.index(pattern)]:g}" if pattern in PATTERNS else ""
                for pattern in patterns
            ),
        )
        for model, row in PERPLEXITIES.items()
        if method in row
    ]
