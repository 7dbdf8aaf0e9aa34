"""
How well a proxy ranks candidates, as validations give it and the API answers it.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

WIDER = 4  # times as many finalists are confirmed where the proxy does not rank

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class ProxyQuality:
    """How well a proxy ranks, against perplexity; intervals are 95 %, bootstrap over candidates."""

    spearman: Annotated[
        float,
        Field(
            description="Rank correlation with perplexity, -1 to 1; 1 is perfect for a proxy to be "
            "minimised, -1 for Gini."
        ),
    ]
    spearman_interval: Interval
    spearman_better_half: Annotated[
        float, Field(description="The same among the half with the lower perplexity.")
    ]
    kendall: Annotated[float, Field(description="Kendall's tau-b.")]
    kendall_interval: Interval
    regret: Annotated[
        float,
        Field(
            description="Relative excess of the best perplexity among the proxy's top k over the "
            "best of all; 0 if the best candidate is in the top k."
        ),
    ]
    regret_interval: Interval
    top_k: Annotated[int, Field(description="k of the regret.")]
