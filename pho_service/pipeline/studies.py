"""
What the study of a search is called, and whose it is.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna

from pho_service.errors import StudyError
from pho_service.pruning.bundle import ProxyBundle
from pho_service.tuning.plan import SearchPlan
from pho_service.tuning.request import SearchRequest
from storage.studies import StorageError, check_url, keep_record, record_of

_ROWS = "bundle_rows_sha256"  # record of a study


def check_study_url(url: str) -> None:
    """
    See before any long work that a study may be kept at ``url``.

    Raises:
        StudyError: It is not the URL of a database, or one that keeps nothing.
    """
    try:
        check_url(url)
    except StorageError as error:
        raise StudyError(f"--study {url}: {error}") from error


def study_name(
    request: SearchRequest, plan: SearchPlan, provenance: Mapping[str, Any], rated_on: str = ""
) -> str:
    """
    Names a study after what it searches, so that the same request finds it again.

    The number of trials is left out: a longer search goes on with a shorter one.

    Args:
        request: What is asked.
        plan: Plan of the search.
        provenance: Provenance of the bundle.
        rated_on: Hash of the text, if candidates are rated by perplexity.
    """
    options = plan.identity()
    identity = [
        provenance.get("key", ""), str(plan.pattern), plan.pattern.scope,
        request.objective.label, plan.space.to_dict(),
        plan.sampler_name, options.pop("seed"), plan.fisher, rated_on, plan.steps.to_dict(),
        *([list(plan.warm_start)] if plan.warm_start else []), *([options] if options else []),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
    model_name = Path(provenance.get("model", {}).get("name", "model")).name
    return f"{model_name} {plan.pattern} {plan.pattern.scope.value} {plan.sampler} {digest}"


def check_study(study: optuna.Study, bundles: Iterable[ProxyBundle]) -> None:
    """
    See that a study is of these bundles and no others, and note it in a new one.

    The key of a bundle is in the study's name. Who puts bundles together by hand may give two
    of them the same, so the sampled weights are compared, too.

    Raises:
        StudyError: Its trials are of a bundle with other weights.
    """
    found = [*bundles]
    rows = [bundle.rows_sha256 for bundle in found]
    known = record_of(study).get(_ROWS)
    if known is None:
        keep_record(study, _ROWS, rows)
    elif known != rows:
        raise StudyError(
            f"study {study.study_name!r} is of a bundle with other weights under the same key, "
            f"{', '.join(bundle.key for bundle in found)}. Give each bundle's provenance a key "
            "of its own, or none, which names it by its contents; or use another --study."
        )
