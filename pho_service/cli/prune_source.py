"""
Where `pho prune` has its configuration from: a file, a published method, a library.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pho_service.cli.document import Given
from pho_service.cli.library import Found, best_of_library, wanted_for
from pho_service.cli.terminal import say
from pho_service.errors import ConfigurationError
from pho_service.spec.linears import Linears
from pho_service.spec.numbers import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pho_service.models.loading import LanguageModel
    from pho_service.pruning.bundle import ProxyBundle
    from pho_service.spec.configuration import Configuration

TRIED = 5  # configurations of a library that are rated by the proxy, the most promising first


@dataclass(frozen=True, kw_only=True)
class Source:
    """
    Where the configuration comes from: it is given, or else chosen from a library.

    Attributes:
        deployable: Whether it may only permute what can be folded into the weights.
    """

    configuration: "Configuration | None"
    library: str | None
    pattern: str | None
    scope: str | None
    force: bool
    deployable: bool

    def of_library(self, model: "LanguageModel") -> "list[Found]":
        """The most promising configurations for a model, the best first."""
        wanted = wanted_for(
            {"name": model.name, "family": model.family, "parameters": model.parameters},
            str(self.pattern),
            self.scope,
        )
        return best_of_library(self.library, wanted, 1 if self.force else TRIED)

    def chosen(
        self, found: "Sequence[Found]", model: "LanguageModel", bundle: "ProxyBundle"
    ) -> "Found":
        """
        The first that the proxy does not judge worse than RIA.

        Raises:
            ConfigurationError: It judges all of them so.
        """
        from pho_service.errors import BundleError
        from pho_service.pipeline.transfer import no_better_than_ria, proxies_of, proxy_sentence

        for each in found:
            about = f"{each.origin['id']} of the library"
            try:
                proxies = proxies_of(bundle, each.configuration, str(model.device))
            except BundleError as error:
                sentence = f"Note: whether it holds on {model.name} is not known: {error}"
            else:
                if no_better_than_ria(proxies) and not self.force:
                    say(
                        f"Leaving {about} out: its proxy on {model.name}, "
                        f"{number(proxies['transferred'])}, is no better than RIA's, "
                        f"{number(proxies['ria'])}."
                    )
                    continue
                sentence = proxy_sentence(model.name, proxies)
            say(f"Taking {about}: {'; '.join(each.origin['reasons'])}.")
            say(sentence)
            return each
        raise ConfigurationError(
            f"none of the library's {len(found)} most promising configurations for {self.pattern} "
            f"holds on {model.name}: by the proxy each is no better than RIA. Search there: `pho "
            f"search {model.name} --pattern {self.pattern}`; or take the most promising one in "
            "spite of that with --force."
        )


def given_configuration(
    path: str | None, method: str | None, pattern: str | None, scope: str | None, given: Given
) -> "Configuration | None":
    """What a file or a method's name says; None if a library is asked."""
    from pho_service.spec.configuration import published, read_configuration

    if path is not None:
        return read_configuration(Path(path))
    if method is None:
        return None
    linears = Linears.from_dict(given.document().get("steps", {}).get("linears", {}))
    return published(method, str(pattern), scope, linears)
