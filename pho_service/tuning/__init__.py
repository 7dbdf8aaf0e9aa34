"""Hyperparameter optimisation: candidates in, the best configuration out; no model is seen."""
