"""
What it costs a search to permute only channels whose order can be folded into the weights.
"""

from dataclasses import replace

import optuna

from pho_service.pipeline.rating import Subject
from pho_service.pipeline.winner import measured_once
from pho_service.progress import Run
from pho_service.spec.numbers import number
from pho_service.tuning.result import SearchResult


def priced(
    result: SearchResult,
    study: optuna.Study,
    subject: Subject,
    run: Run = Run(),
) -> SearchResult:
    """Say of a result whose orders must fold what it would be with every order free."""
    configuration = result.configuration
    steps, confirmation = configuration.steps, configuration.confirmation
    if confirmation is None or not steps.gives_up_orders:
        return result
    chosen = subject.bundle.choose(steps.linears, configuration.candidate().pattern)
    given_up = len(chosen.names - subject.model.foldable)
    if not given_up:
        return result
    free = replace(configuration.candidate(), steps=replace(steps, deployable=False))
    perplexity = measured_once(
        study, subject, free, run, kept="any_order", title="Pruning in any order"
    )
    sentence = (
        f"Deployable: {given_up} of {len(chosen.names)} linears keep the model's own order of "
        "channels, since no other one can be folded into their weights. The perplexity is "
        f"{number(confirmation.perplexity)}; permuted as well, which a runtime would have to do, "
        f"it would be {number(perplexity)}."
    )
    told = confirmation.model_copy(update={"any_order": perplexity})
    return replace(
        result,
        configuration=configuration.model_copy(update={"confirmation": told}),
        warnings=[*result.warnings, sentence],
    )
