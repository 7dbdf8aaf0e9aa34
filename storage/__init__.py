"""What PHO keeps: studies in Optuna's own tables."""
