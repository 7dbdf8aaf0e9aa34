"""
The samplers that a search can take its candidates from.
"""

from typing import Literal, get_args

Sampler = Literal["cmaes", "tpe", "random", "qmc", "gp", "hill-climb"]

# How many candidates each sampler gives before it wants to know their values.
SAMPLERS: dict[str, int] = {
    **dict.fromkeys(get_args(Sampler), 1),
    **{"cmaes": 8, "random": 8, "qmc": 8},
}
