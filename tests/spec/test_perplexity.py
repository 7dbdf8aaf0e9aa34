"""Two perplexities of one text, and how sure their ratio is."""

import pytest

from pho_service.spec.perplexity import Perplexity, Ratio


def measured(losses, perplexity=20.0, text="a"):
    return Perplexity(
        perplexity=perplexity, tokens=60, windows=3, text_sha256=text, losses=losses
    )  # fmt: skip


def test_the_standard_error_of_a_ratio_is_that_of_paired_losses():
    mine, other = measured([10.0, 12.0, 17.0], 22.0), measured([9.0, 12.0, 13.0])
    ratio = mine.against(other)

    assert (ratio.perplexity, ratio.reference) == (22.0, 20.0)
    assert ratio.error == pytest.approx(2.0817 * 3**0.5 / 60, rel=1e-4)
    assert ratio.rise_error == pytest.approx(1.1 * ratio.error)
    assert mine.against(measured([])).error is None
    assert measured([1.0]).against(measured([2.0])).error is None


def test_perplexities_of_different_texts_do_not_compare():
    with pytest.raises(ValueError, match="different texts"):
        measured([1.0, 2.0]).against(measured([1.0, 2.0], text="b"))


def test_a_ratio_in_words():
    ratio = Ratio(27.71, 22.6, 0.004)

    assert str(ratio) == "+22.6 ± 0.5%"
    assert ratio.beside("dense") == "22.6 ± 0.5% above dense (22.60)"
    assert Ratio(27.71, 41.24, 0.01).saved == "32.8 ± 0.7%"
    assert Ratio(27.71, 39.9, 0.2).beside("Wanda") == "statistically tied with Wanda (39.90)"
    assert Ratio(27.71, 27.71).beside("RIA") == "the same as RIA"
    assert Ratio.of_rise(27.71, 22.6, ratio.rise_error).error == pytest.approx(0.004)
