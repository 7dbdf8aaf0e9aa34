"""
`pho.baseline`: a published method as a configuration.
"""

from dataclasses import dataclass, field

from pho_service.interface.asked import LinearArguments, arguments
from pho_service.interface.models import parsed
from pho_service.spec.configuration import Configuration, published
from pho_service.spec.pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class BaselineArguments(LinearArguments):
    """
    Arguments of ``pho.baseline``.

    Attributes:
        method: Its name in `pho compare`: ``wanda``, ``ria-row-sequential``,
            ``sparsegpt-permuted``. A name that is not known is refused with all that are.
        pattern: Share of the weights to remove (``"0.5"``), or N kept of M (``"2:4"``).
        scope: None is the method's own; ``crepe-equal`` takes ``row``, ``layer`` or ``global``.
    """

    method: str = field(kw_only=False)
    pattern: str | float | Pattern = field(kw_only=False)
    scope: str | None = None


@arguments(BaselineArguments)
def baseline(asked: BaselineArguments) -> Configuration:
    """
    Give the configuration that prunes as a published method does, as `pho prune --method NAME`.

    It is taken wherever one that was found is: ``pho.prune(model, pho.baseline("wanda", "2:4"),
    bundle)``.

    Raises:
        InvalidInput: The method is not known, not defined in this pattern, or has another scope.
    """
    pattern = parsed(asked.pattern, asked.scope)
    return published(asked.method, pattern, asked.scope, asked.linears)
