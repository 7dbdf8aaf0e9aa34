"""Which linears are pruned: names, globs and regular expressions, and sparsities by hand."""

import json
import time

import pytest

from pho_service.errors import InvalidInput
from pho_service.spec.pattern import Linears, Pattern
from pho_service.spec.steps import Steps

NAMES = [
    f"model.layers.{block}.{kind}"
    for block in (0, 1, 10)
    for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
]
HALF = Pattern.parse("0.5", "global")


def pruned(**fields):
    chosen = Linears(**fields).choose(NAMES, HALF)
    return [name.removeprefix("model.layers.") for name in NAMES if name in chosen.names]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["model.layers.1.mlp.down_proj"], ["1.mlp.down_proj"]),
        (["*.layers.1.*"], ["1.self_attn.q_proj", "1.self_attn.k_proj", "1.mlp.down_proj"]),
        (["*.0.*.[qk]_proj"], ["0.self_attn.q_proj", "0.self_attn.k_proj"]),
        (["re:.*\\.1\\d\\.mlp\\..*", "*.0.mlp.*"], ["0.mlp.down_proj", "10.mlp.down_proj"]),
    ],
    ids=["name", "glob", "set", "regular expression"],
)
def test_a_pattern_matches_whole_names(patterns, names):
    assert pruned(targets=patterns) == names
    assert sorted(pruned(ignore=patterns) + names) == sorted(pruned())


def test_a_target_that_is_ignored_stays_dense_and_has_no_sparsity_by_hand_either():
    linears = Linears(
        targets=["*.0.*", "*.1.*"], ignore="*.[qk]_proj", sparsities={"*_proj": 0.25, "*.0.x": 0.1}
    )

    with pytest.raises(InvalidInput, match="matches none of the 2 pruned linears of the model"):
        linears.choose(NAMES, HALF)
    chosen = Linears(targets=["*.0.*"], ignore="*.[qk]_proj", sparsities={"*": 0.25}).choose(
        NAMES, HALF
    )
    assert chosen.shared == ()
    assert chosen.patterns == {"model.layers.0.mlp.down_proj": Pattern.parse("0.25", "global")}


def test_they_are_shares_for_a_ratio_and_another_n_of_the_same_m_for_n_m():
    by_share = Linears(sparsities={"*.down_proj": 0.3}).choose(NAMES, HALF)
    by_groups = Linears(sparsities={"*.down_proj": "3:4"}).choose(NAMES, Pattern.parse("2:4"))

    assert set(by_share.patterns.values()) == {Pattern.parse("0.3", "global")}
    assert set(by_groups.patterns.values()) == {Pattern.parse("3:4")}
    assert list(by_share.patterns) == [name for name in NAMES if name not in by_share.shared]


@pytest.mark.parametrize(
    ("fields", "near"),
    [
        ({"targets": ["q_proj"]}, r"targets: 'q_proj' matches none of the 9 .*Near: \*\.q_proj"),
        ({"ignore": ["*.lm_head"]}, r"ignore: '\*\.lm_head' matches none .* some/model\. Near: "),
        ({"ignore": ["model.layers.2.mlp.down_proj"]}, r"Near: model\.layers\.[01]\.mlp\.down_p"),
        ({"targets": ["re:layers"]}, "'re:layers' matches none"),
        ({"sparsities": {"*.dwn_proj": 0.3}}, r"sparsities: .* Near: \*\.down_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(fields, near):
    with pytest.raises(InvalidInput, match=near):
        Linears(**fields).choose(NAMES, HALF, model="some/model")


def test_two_sparsities_for_a_linear_and_nothing_left_to_prune_are_refused():
    twice = Linears(sparsities={"*.0.*": 0.3, "*.down_proj": 0.4})

    with pytest.raises(InvalidInput, match=r"model.layers.0.mlp.down_proj has two .*'\*\.0\.\*'"):
        twice.choose(NAMES, HALF)
    with pytest.raises(InvalidInput, match="leave none of the 9 linears of the model to prune"):
        Linears(ignore="*").choose(NAMES, HALF)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"targets": [""]}, "targets has '', which is not the name of a linear"),
        ({"ignore": ["a\nb"]}, r"ignore has 'a\\nb', which is not"),
        ({"ignore": ["x" * 513]}, "513 characters.*512 are the most"),
        ({"targets": ["a"] * 257}, "257 patterns, and 256 are the most"),
        ({"targets": ["re:(a"]}, r"'re:\(a', which is not a regular expression"),
        ({"sparsities": {"a": 1.5}}, "a=1.5: sparsity 1.5 is not between 0 and 1.*ignore it"),
        ({"sparsities": {"a": 0}}, "a=0: sparsity 0 is not between 0 and 1.*ignore it"),
        ({"sparsities": {"a": True}}, "a=True is not a sparsity"),
        ({"sparsities": {"a": "much"}}, "'much' is neither a number nor N:M"),
    ],
)
def test_what_no_model_could_satisfy_is_refused(fields, rule):
    with pytest.raises(InvalidInput, match=rule):
        Linears(**fields)


@pytest.mark.parametrize(
    ("pattern", "value", "rule"),
    [("0.5", "3:4", "a share to remove"), ("2:4", 0.3, "N:4"), ("2:4", "4:8", "N:4")],
)
def test_a_sparsity_fits_the_pattern(pattern, value, rule):
    steps = Steps(linears=Linears(sparsities={"*.down_proj": value}))

    with pytest.raises(InvalidInput, match=f"does not fit the pattern {pattern}. Give {rule}"):
        steps.check_pattern(Pattern.parse(pattern))


def test_a_slow_expression_is_stopped(monkeypatch):
    monkeypatch.setattr("pho_service.spec.pattern.SECONDS", 0.05)

    with pytest.raises(InvalidInput, match=r"take more than 0.05 s on 9 names"):
        Linears(ignore=["re:(?:.|.|..)*(?<=v_proj)"]).choose(NAMES, HALF)


def test_all_expressions_of_a_job_have_one_time_together(monkeypatch):
    """None of them takes long; all of them, at each pattern of a curve, would."""
    monkeypatch.setattr("pho_service.spec.pattern.SECONDS", 0.01)
    slow = [f"re:(?:(?:a{{10}}b|.){{30}}.{{3}}{i}?)*.*" for i in range(256)]
    began = time.monotonic()
    with pytest.raises(InvalidInput, match="regular expressions up to"):
        Linears(targets=slow, sparsities=dict.fromkeys(slow, 0.3)).choose(NAMES, HALF)

    assert time.monotonic() - began < 3


def test_an_expression_that_would_be_written_out_to_gigabytes_is_refused():
    nested = "(?:(?:(?:(?:a{999}){999}){999}){999})|.*"
    for pattern in (nested, "(a{31}){33}", "(?x)(?:a{9 9}){9 9}", "a{,1001}", "a{1001,}"):
        with pytest.raises(InvalidInput, match=r"counted repeats come to .* and 1000 are"):
            Linears(targets=[f"re:{pattern}"])

    assert Linears(targets=["re:.*\\.[0-9]{1,3}\\.mlp.{5,}"])


def test_what_is_said_is_read_back_where_nothing_is_said_nothing_is_written():
    linears = Linears(targets=["*.0.*"], ignore="*.k_proj", sparsities={"*.down_proj": 0.3})
    steps = Steps(linears=linears)

    assert Steps.from_dict(json.loads(json.dumps(steps.to_dict()))) == steps
    assert "linears" not in Steps().to_dict()
    assert str(steps).endswith("only *.0.*, without *.k_proj, by hand *.down_proj=0.3")
