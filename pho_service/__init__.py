"""PHO: finds pruning coefficients for large language models by a fast proxy."""
