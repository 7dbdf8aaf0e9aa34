"""Uniform structures are as near to a share as their steps allow."""

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from pho_service.errors import InvalidInput
from pho_service.spec.baselines import baseline
from pho_service.spec.configuration import Configuration
from pho_service.spec.curve import curve_patterns
from pho_service.spec.pattern import Pattern
from pho_service.spec.structure import (
    BlockShapes,
    Cut,
    Goal,
    Structure,
    split,
    usual_multiple,
)

SMOLLM2 = BlockShapes(
    layers=30, layer_weights=3_538_944, width=1536, multiple=64, neuron_weights=3 * 576,
    query_heads=(9, 6, 3), head_weights=2 * 64 * 576, parameters=134_515_008,
)  # fmt: skip


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.5, 0.9])
def test_every_structure_is_within_half_a_step(share):
    structures = split(share, SMOLLM2)

    assert len({json.dumps(s.to_dict()) for s in structures}) == len(structures)
    for structure in structures:
        layers = 30 - structure.dropped
        half = layers * 64 * SMOLLM2.neuron_weights / 2 / SMOLLM2.weights
        assert abs(SMOLLM2.removed_share(structure) - share) <= half + 1e-12
        assert structure.neurons is None or structure.neurons % 64 == 0 < structure.neurons
        assert layers >= 1


def test_a_fifth_of_smollm2():
    structures = split(0.2, SMOLLM2)

    assert structures[0] == Structure(neurons=1152)  # 409.6 neurons are a fifth
    assert Structure(dropped=6) in structures
    assert {s.query_heads for s in structures} == {None, 6, 3}


def test_shares_are_counted_by_hand():
    assert SMOLLM2.removed_share(Structure()) == 0
    assert SMOLLM2.removed_share(Structure(dropped=15)) == 0.5
    assert SMOLLM2.removed_share(Structure(layers=(0, 1, 29))) == pytest.approx(0.9)
    lost = 384 * 3 * 576 + 3 * 2 * 64 * 576
    expected = lost / 3_538_944
    assert SMOLLM2.removed_share(Structure(neurons=1152, query_heads=6)) == pytest.approx(expected)


def test_a_mixture_gives_up_heads_and_layers_alone():
    shapes = BlockShapes(
        layers=8, layer_weights=1000, width=0, multiple=1, neuron_weights=0,
        query_heads=(4, 2), head_weights=50, parameters=10_000,
    )  # fmt: skip

    assert split(0.26, shapes)[-1] == Structure(dropped=2)
    assert Structure(query_heads=2) in split(0.1, shapes)


@pytest.mark.parametrize(("share", "shown"), [(0, "0"), (1, "1"), (0.01, "0.01"), (0.999, "0.999")])
def test_impossible_shares(share, shown):
    with pytest.raises(InvalidInput, match=f"share of {shown}"):
        split(share, SMOLLM2)


def test_multiples():
    widths = (1536, 11008, 2048, 512, 1500, 64, 24, 7)

    assert [usual_multiple(width) for width in widths] == [64, 64, 64, 32, 4, 4, 1, 1]


def test_a_structure_is_json_and_checked():
    structure = Structure(neurons=64, layers=(0, 2))

    assert Structure.from_dict(json.loads(json.dumps(structure.to_dict()))) == structure
    for values, message in (
        ({"neurons": 0}, "neurons"),
        ({"layers": [0], "dropped": 1}, "Give one of the two"),
        ({"layers": []}, "leaves no block"),
        ({"layers": [1, 0]}, "not ascending"),
        ({"heads": 3}, "heads"),
    ):
        with pytest.raises(InvalidInput, match=message):
            Structure.from_dict(values)


@pytest.mark.parametrize(
    ("text", "share", "shown"),
    [("structured:20%", 0.2, "20%"), ("structured:0.07", 0.07, "7%"),
     ("structured: 12.5 %", 0.125, "12.5%")],
)  # fmt: skip
def test_a_pattern_that_is_read_and_written(text, share, shown):
    pattern = Pattern.parse(text)

    assert pattern.structured
    assert pattern.sparsity == share
    assert str(pattern) == f"structured:{shown}"
    assert Pattern.parse(str(pattern), "layer") == pattern


@pytest.mark.parametrize("words", ["", "20", "0", "100%", "-5%", "half", "nan"])
def test_no_share(words):
    with pytest.raises(InvalidInput, match="is not a share of the blocks' weights"):
        Pattern.parse(f"structured:{words}")


def test_nothing_that_scores_single_weights_takes_it():
    cut = Pattern.parse("structured:20%")

    with pytest.raises(InvalidInput, match="no score of single weights does that"):
        baseline("wanda", cut)
    with pytest.raises(InvalidInput, match="Ask for two curves"):
        curve_patterns(["0.5", "structured:20%"], None)
    with pytest.raises(InvalidInput, match="scope 'row' has no meaning"):
        Pattern.parse("structured:20%", "row")


def test_a_configuration_cuts_or_scores():
    structure = Structure(neurons=1152)
    cut = Cut.of(structure, SMOLLM2)
    configuration = Configuration(
        method="structured", cut=cut, pattern="structured:20%", scope="layer"
    )

    assert Configuration.model_validate(configuration.model_dump(mode="json")) == configuration
    assert str(cut) == (
        "1,152 neurons, of 30 blocks with 1,536 neurons and 9 query heads: 18.8% of their weights "
        "are gone"
    )
    with pytest.raises(InvalidInput, match="`pho prune MODEL --config` does that"):
        configuration.candidate()
    for wrong in ({"cut": None}, {"pattern": "0.5"}):
        with pytest.raises(ValidationError, match="cut"):
            Configuration.model_validate({**configuration.model_dump(mode="json"), **wrong})
    with pytest.raises(InvalidInput, match=r"but other has 28 blocks.*--pattern structured:19%"):
        cut.check(replace(SMOLLM2, layers=28), "other")


@pytest.mark.parametrize("smaller", ["20%", "0.2"])
def test_a_share_of_the_file_is_a_larger_one_of_the_blocks_since_embeddings_stay(smaller):
    pattern = Pattern.parse(f"smaller:{smaller}")

    assert str(pattern) == "smaller:20%"
    assert Pattern.parse(str(pattern), "layer") == pattern
    assert pattern.cut_share(parameters=100, prunable=80) == pytest.approx(0.25)
    assert pattern.splits(SMOLLM2) == split(0.2 * SMOLLM2.parameters / SMOLLM2.weights, SMOLLM2)


@pytest.mark.parametrize("smaller", ["0", "-1%", "a fifth", "nan", "", "100%"])
def test_no_share_of_the_file(smaller):
    with pytest.raises(InvalidInput, match=r"is not a share of the file\. Write smaller:20%"):
        Pattern.parse(f"smaller:{smaller}")


def test_a_share_of_the_file_that_takes_more_than_half_of_the_blocks_is_refused():
    with pytest.raises(InvalidInput, match="smaller:50% is more than 40% of this model's file"):
        Pattern.parse("smaller:50%").cut_share(parameters=100, prunable=80)


@pytest.mark.parametrize(
    ("pattern", "goal"),
    [
        ("bytes:95MB", {"bytes": 95_000_000}),
        ("bytes:1.5GiB", {"bytes": 3 * 2**29}),
        ("faster:1.2x", {"times": 1.2}),
        ("faster:1.2x:llama.cpp", {"times": 1.2, "runtime": "llama.cpp"}),
        ("faster:1.2x:llama.cpp:q4_0", {"times": 1.2, "runtime": "llama.cpp", "type": "q4_0"}),
    ],
)
def test_a_goal_is_a_cut_whose_share_the_model_has_to_tell(pattern, goal):
    parsed = Pattern.parse(pattern)

    assert parsed.goal == Goal(pattern=pattern, **goal)
    assert str(parsed) == pattern
    assert Pattern.parse(str(parsed), "layer") == parsed
    assert parsed.structured
    assert parsed.splits(SMOLLM2, 0.2) == split(0.2, SMOLLM2)
    assert parsed.splits(SMOLLM2) == [Structure()]  # until it has told


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("bytes:much", r"'bytes:much' is not the size of a file\. Write bytes:95MB"),
        ("bytes:", "is not the size of a file"),
        ("bytes:-1MB", "is not the size of a file"),
        ("bytes:95", "is not the size of a file"),
        ("faster:1x", r"no number of times above 1 and up to 10\. Write faster:1\.2x"),
        ("faster:nan", "no number of times above 1"),
        ("faster:11x", "no number of times above 1"),
        ("faster:1.2x:vllm", r"runtime 'vllm' is not one of torch, llama\.cpp"),
        ("faster:1.2x:torch:q8_0", r"names more .*faster:1\.2x:llama\.cpp:q8_0"),
        ("faster:1.2x:llama.cpp:q8_0:4", "names more"),
        ("faster:1.2x:llama.cpp:q9", "type 'q9' is not one of f32"),
    ],
)
def test_no_goal(pattern, message):
    with pytest.raises(InvalidInput, match=message):
        Pattern.parse(pattern)


@pytest.mark.parametrize("goal", ["bytes:95MB", "faster:1.2x"])
def test_goals_make_no_curve(goal):
    with pytest.raises(InvalidInput, match=f"{goal} is what one cut is for.*Ask for it by itself"):
        curve_patterns([goal, "structured:20%"], None)


def test_shares_of_the_file_and_of_the_blocks_make_no_curve():
    assert [str(each) for each in curve_patterns(["smaller:20%", "smaller:10%"], None)] == [
        "smaller:10%", "smaller:20%",
    ]  # fmt: skip
    with pytest.raises(InvalidInput, match=r"smaller:20% is a share of the file.*all in one way"):
        curve_patterns(["structured:20%", "smaller:20%"], None)
