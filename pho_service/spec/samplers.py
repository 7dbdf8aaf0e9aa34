"""
The samplers that a search can take its candidates from.
"""

# How many candidates each sampler gives before it wants to know their values.
SAMPLERS = {"cmaes": 8, "tpe": 1, "random": 8, "qmc": 8, "gp": 1, "hill-climb": 1}
