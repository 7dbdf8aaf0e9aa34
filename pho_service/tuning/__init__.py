"""
Hyperparameter optimisation: candidates in, the best configuration out.

It knows Optuna and a function that rates candidates; it never sees a model.
"""
