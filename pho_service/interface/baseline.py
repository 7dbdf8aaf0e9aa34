"""
`pho.baseline`: a published method as a configuration.
"""

from pho_service.interface.asked import Patterns, Sparsities, given_linears
from pho_service.interface.models import parsed
from pho_service.spec.configuration import Configuration, published
from pho_service.spec.pattern import Pattern


def baseline(
    method: str,
    pattern: str | float | Pattern,
    *,
    scope: str | None = None,
    targets: Patterns = (),
    ignore: Patterns = (),
    sparsities: Sparsities | None = None,
) -> Configuration:
    """
    Give the configuration that prunes as a published method does, as `pho prune --method NAME`.

    It is taken wherever one that was found is: ``pho.prune(model, pho.baseline("wanda", "2:4"),
    bundle)``.

    Args:
        method: Its name in `pho compare`: ``wanda``, ``ria-row-sequential``,
            ``sparsegpt-permuted``. A name that is not known is refused with all that are.
        pattern: Share of the weights to remove (``"0.5"``), or N kept of M (``"2:4"``).
        scope: None is the method's own; ``crepe-equal`` takes ``row``, ``layer`` or ``global``.
        targets, ignore, sparsities: Which linears are pruned, as of ``pho.search``.

    Raises:
        InvalidInput: The method is not known, not defined in this pattern, or has another scope.
    """
    asked = parsed(pattern, scope)
    return published(method, asked, scope, given_linears(targets, ignore, sparsities))
