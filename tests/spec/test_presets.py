"""Searches with a name."""

import pytest

from pho_service.errors import InvalidInput
from pho_service.spec.pattern import Pattern
from pho_service.spec.space import PRESETS, Preset
from pho_service.spec.steps import Steps
from pho_service.tuning.plan import SearchRequest

LAYER, TWO_FOUR = Pattern.parse("0.5"), Pattern.parse("2:4")


@pytest.mark.parametrize("pattern", ["0.5", "0.5 row", "0.5 global", "2:4", "4:8"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_searched_in_every_pattern_and_scope(name, pattern):
    parsed = Pattern.parse(*pattern.split())
    preset = Preset.of(name, parsed)
    plan = SearchRequest(pattern=parsed, steps=preset.steps, bounds=preset.bounds).plan((3, 5))

    assert plan.pattern == parsed


def test_crepe_is_the_score_as_published_no_gradient_exponent_nothing_beside_the_score():
    preset = Preset.of("crepe", LAYER)

    assert preset.bounds == {"gradient_exponent": (0.0, 0.0)}
    assert preset.steps == Steps()


@pytest.mark.parametrize("pattern", [LAYER, TWO_FOUR])
def test_crepe_plus_leaves_kept_weights_alone_best_does_not(pattern):
    plus, best = (Preset.of(name, pattern).steps for name in ("crepe-plus", "best"))

    assert (plus.update, plus.reconstruction.wanted) == ("none", False)
    assert (best.update, best.reconstruction.wanted) == ("least-squares", True)


def test_what_a_user_says_replaces_what_the_preset_says_field_by_field():
    preset = Preset.of("best", LAYER).changed({"update": "obs"}, {"row_share": (0.1, 0.2)})

    assert preset.steps.update == "obs"
    assert preset.bounds["allocation_spread"] == (0.05, 0.4)
    assert preset.bounds["row_share"] == (0.1, 0.2)


def test_a_step_that_contradicts_the_presets_and_another_name_are_refused():
    with pytest.raises(InvalidInput, match=r"update 'sparsegpt'.* not given are the preset's"):
        Preset.of("best", LAYER).changed({"update": "sparsegpt"}, {})
    with pytest.raises(InvalidInput, match=r"update is 'none'.* those of 'score' are none"):
        Preset.of("best", LAYER).changed({"update": "none"}, {})
    with pytest.raises(InvalidInput, match=r"preset 'worst' is not one of score, crepe"):
        Preset.of("worst", LAYER)


def test_best_shrinks_second_moments_unless_nothing_looks_at_them():
    best = Preset.of("best", LAYER)
    alone = {"repruning": "none", "update": "none"}

    assert best.steps.shrinkage > 0
    assert best.changed({"update": "obs"}, {}).steps.shrinkage == best.steps.shrinkage
    assert best.changed(alone, {}).steps.shrinkage == 0
    assert best.changed({"shrinkage": 0.0}, {}).steps.shrinkage == 0
    with pytest.raises(InvalidInput, match="shrinkage=3 has nothing to shrink"):
        best.changed({**alone, "shrinkage": 3.0}, {})
