"""Perplexities of models in memory: as the command line measures them."""

import pho_service as pho


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
