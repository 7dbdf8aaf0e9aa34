"""Perplexities of models in memory: as the command line measures them."""

import pytest

import pho_service as pho
from pho_service.errors import BundleError, ConfigurationError, InvalidInput


def test_with_the_bundle_that_was_made_neither_a_text_nor_a_tokenizer_is_needed_again(
    tiny_llama, bundle, texts, weights
):
    found = pho.compare(tiny_llama, None, "2:4", bundle=bundle, report=texts["report"])

    assert weights()
    methods = [row.method for row in found.rows]
    assert methods[-1] == "sparsegpt-permuted"  # which needs windows
    assert {"wanda", "wanda-permuted", "wanda-sequential", "sparsegpt"} < {*methods}
    assert not any("owl" in method for method in methods)
    assert [row.sparsity for row in found.rows] == [0, *[0.5] * (len(methods) - 1)]
    assert found.report["context_length"] == 32
    frame = found.to_dataframe()
    assert list(frame["method"]) == methods
    assert "extra" not in frame


def test_a_configuration_of_another_pattern_or_family_and_a_comparison_on_nothing(
    tiny_llama, bundle, windows, configuration
):
    elsewhere = configuration.model_copy(update={"model": {"family": "gpt2"}})

    def compare(pattern, **more):
        pho.compare(tiny_llama, None, pattern, **{"bundle": bundle, "report": windows, **more})

    with pytest.raises(ConfigurationError, match=r"mine is for the pattern 0.5.*for 2:4"):
        compare("2:4", configurations={"mine": configuration})
    with pytest.raises(ConfigurationError, match=r"mine was found on gpt2.*family llama"):
        compare("0.5", configurations={"mine": elsewhere})
    with pytest.raises(InvalidInput, match="nothing to calibrate on"):
        compare("0.5", bundle=None)
    with pytest.raises(InvalidInput, match="trains on texts beyond the bundle's windows"):
        compare("0.5", configurations={"mine": configuration}, recovery={"tokens": 256})
    with pytest.raises(InvalidInput, match="scope 'row' is given beside a pattern"):
        compare(pho.Pattern.parse("0.5"), scope="row")
    with pytest.raises(InvalidInput, match="a float is given for a configuration"):
        compare("0.5", configurations={"mine": 0.5})


def test_other_bundle(tiny_llama, bundle, windows):
    """A bundle of other weights is refused."""
    tiny_llama.model.layers[0].mlp.up_proj.weight.data += 1

    with pytest.raises(BundleError, match="bundle is of another model"):
        pho.compare(tiny_llama, None, "0.5", bundle=bundle, report=windows)
