"""The ranking of a library's configurations, by hand; and the files that they come from."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.library import (
    Entry,
    Gain,
    GainElsewhere,
    ModelFacts,
    TransferTarget,
    Wanted,
    measured_gain,
    parse_library_file,
    rank,
    read_folder,
    read_library_file,
    transferred_gain,
)
from pho_service.spec.pattern import Pattern, Scope

CONFIRMED = {"perplexity": 18.0, "tokens": 9, "context_length": 8, "text": {}}
TARGET = {
    "target": "org/gemma", "key": "00ff", "model": {"name": "org/gemma", "family": "gemma3_text"},
    "perplexities": {"dense": 20.0, "ria": 40.0, "transferred": 50.0},
    "report": {"deep": [1.5, None]},
    "proxies": {"ria": 0.5, "transferred": None}, "warnings": ["it does not transfer"],
}  # fmt: skip


def document(**changes):
    score = {
        "row": 0.1 + 0.2, "column": 0.7, "neighbourhood": 0.0, "kernel_size": 3,
        "activation_exponent": 0.5,
    }  # fmt: skip
    return {
        "format": "pho-configuration", "version": 2, "method": "crepe", "pattern": "0.5",
        "scope": "layer", "coefficients": score, **changes,
    }  # fmt: skip


def transfer(*targets, **changes):
    return {
        "format": "pho-transfer", "version": 1, "source": "c.json", "configuration": document(),
        "targets": [*targets], **changes,
    }  # fmt: skip


def parsed(values):
    return parse_library_file(values, "it")


def rated(method, **numbers):
    return {"method": method, "trial": 1, **numbers}


def entry(
    name,
    share=0.2,
    *,
    by="proxy",
    pattern="0.5",
    scope=None,
    families=("llama",),
    parameters=100,
    elsewhere=None,
    method="crepe",
):
    """An entry that saved this share of RIA's proxy, or perplexity."""
    models = [ModelFacts(name=f"m-{f}", family=f, parameters=parameters) for f in families]
    return Entry(
        id=name,
        method=method,
        pattern=Pattern.parse(pattern, scope),
        models=tuple(models),
        gain=None if share is None else saved(share, by),
        measured=tuple(
            GainElsewhere(model=ModelFacts(name=f"m-{family}", family=family), gain=gain)
            for family, gain in (elsewhere or {}).items()
        ),
    )


def saved(share, by="proxy"):
    return Gain(value=share if by == "proxy" else -math.log(1 - share), by=by)


def order(*entries, **wanted):
    return [match.entry.id for match in rank(entries, Wanted.parse(**wanted))]


@pytest.mark.parametrize(
    ("changes", "share", "by"),
    [
        # Of the two RIAs the last, of the widest scope, counts: 1 - 18/24.
        (
            {
                "confirmation": CONFIRMED,
                "finalists": [rated("crepe", perplexity=18.0, divergence=9.0)],
                "baselines": [
                    rated("ria-row", perplexity=36.0, proxy=1.0),
                    rated("ria-layer", perplexity=24.0, proxy=1.0, divergence=0.1),
                    rated("fisher", perplexity=18.5),
                ],
            },
            0.25,
            "perplexity",
        ),
        # A configuration whose candidates were taken out has its confirmation still: 1 - 18/20.
        (
            {"confirmation": CONFIRMED, "baselines": [rated("ria-layer", perplexity=20.0)]},
            0.1,
            "perplexity",
        ),
        # RIA was compared with the dense model alone: 0.5 - 0.3 nats, 1 - exp(-0.2).
        (
            {
                "confirmation": CONFIRMED,
                "finalists": [rated("crepe", perplexity=18.0, divergence=0.3)],
                "baselines": [rated("ria-layer", divergence=0.5, proxy=1.0)],
            },
            0.18126924692201818,
            "divergence",
        ),
        # Nothing was confirmed: 1 - 0.03/0.04.
        (
            {"objective": {"value": 0.03}, "baselines": [rated("ria-layer", proxy=0.04)]},
            0.25,
            "proxy",
        ),
        # Of several models, the mean of what it is relative to RIA on each, whatever the search's
        # own objective was: 1 - (0.9 + 0.7)/2.
        ({"objective": {"value": 0.9, "relative_to_ria": {"a": 0.9, "b": 0.7}}}, 0.2, "proxy"),
    ],
)  # fmt: skip
def test_perplexity_goes_before_the_proxy(changes, share, by):
    gain = measured_gain(parsed(document(**changes)).configuration)

    assert gain is not None
    assert gain.by == by
    assert gain.share == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": {"value": 0.03}, "baselines": [rated("wanda", proxy=0.04)]},
        {"objective": {"value": 0.5, "direction": "maximize"},
         "baselines": [rated("ria-layer", proxy=0.4)]},
        {"objective": {"value": "0.03"}, "baselines": [rated("ria-layer", proxy=0.04)]},
        {"objective": {"value": 10**400}, "baselines": [rated("ria-layer", proxy=2.0)]},
        {"objective": {"value": 0.03}, "baselines": [rated("ria-layer", proxy=0.0)]},
        {"objective": {"relative_to_ria": {"a": "0.5", "b": None}}},
        {"confirmation": CONFIRMED, "baselines": [rated("ria-layer", perplexity=-1.0)]},
    ],
)  # fmt: skip
def test_without_numbers_to_compare_there_is_no_gain(changes):
    assert measured_gain(parsed(document(**changes)).configuration) is None


def test_on_another_model_the_perplexity_counts_else_the_proxy():
    def gain(**values):
        return transferred_gain(TransferTarget(target="t", **values))

    proxies = {"ria": 2.0, "transferred": 1.0}
    measured = gain(perplexities={"ria": 40.0, "transferred": 50.0}, proxies=proxies)

    assert measured is not None
    assert (measured.by, measured.share) == ("perplexity", pytest.approx(-0.25))
    assert gain(proxies=proxies) == saved(0.5)
    assert gain(perplexities={"ria": 40.0}, proxies={"ria": 2.0, "transferred": None}) is None
    assert gain() is None


def test_a_gain_by_divergence_says_so_and_none_is_the_same_as_rias():
    said = "10.0% below RIA's perplexity, as its divergence from"

    assert str(saved(0.1, "divergence")).startswith(said)
    assert str(saved(0.0, "perplexity")).startswith("RIA's perplexity")


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        (
            {"name": "org/Name-1B", "family": "llama", "parameters": 10**15},
            ("Name-1B", "llama", 10**15),
        ),
        ({}, ("unknown", None, None)),
        ({"name": None, "family": "", "parameters": 0}, ("unknown", None, None)),
        ({"name": "/", "family": 7, "parameters": -3}, ("unknown", None, None)),
        ({"name": 12, "family": ["llama"], "parameters": "5"}, ("12", None, None)),
        ({"name": "m", "parameters": True}, ("m", None, None)),
        ({"name": "m", "parameters": 10**400}, ("m", None, None)),
    ],
)
def test_model_facts(given, facts):
    """What is no name, family or count of parameters is unknown."""
    found = ModelFacts.of(given)

    assert (found.name, found.family, found.parameters) == facts
    assert found.parameters is not True


def test_an_entry_is_of_its_models_and_knows_what_its_configuration_was_worth_elsewhere():
    two = {"name": "joint", "models": [{"name": "a/one"}, {"name": "a/two"}]}
    for model, names in ((two, ["one", "two"]), ({"name": "a/one", "models": [5, "x"]}, ["one"])):
        of_models = Entry.of("1", parsed(document(model=model)))
        assert [each.name for each in of_models.models] == names
    unmeasured = {"target": "b.safetensors", "proxies": {"ria": None, "transferred": None}}
    found = Entry.of("1", parsed(transfer(TARGET, unmeasured)))
    (there,) = found.measured

    assert there.model == ModelFacts(name="gemma", family="gemma3_text")
    assert there.gain.share == pytest.approx(-0.25)
    assert found.to_dict()["measured"] == [
        {
            "model": {"name": "gemma", "family": "gemma3_text", "parameters": None},
            "gains": {"perplexity": there.gain.share, "divergence": None, "proxy": None},
        }
    ]


by_perplexity = partial(entry, by="perplexity")


@pytest.mark.parametrize(
    ("entries", "wanted", "expected"),
    [
        # the asked pattern comes first however little it gained, then others, nearest first
        ([entry("far", 0.9, pattern="0.9"), entry("group", 0.9, pattern="2:4"),
          entry("near", 0.1, pattern="0.6"), entry("worse", -0.1),
          entry("nearest", pattern="0.55")],
         {"pattern": "0.5"}, ["worse", "nearest", "near", "far", "group"]),
        # to N:M another N:M is nearer than any ratio, and 2:4 is not 4:8
        ([entry(each, 0.9 if each == "0.5" else 0.1, pattern=each)
          for each in ("0.5", "3:4", "4:8", "2:4")],
         {"pattern": "2:4"}, ["2:4", "4:8", "3:4", "0.5"]),
        # perplexity comes before the proxy, then unknown, then no better
        ([by_perplexity("no better", 0.0), entry("worse", -0.5), entry("unknown", None),
          entry("proxy", 0.9), by_perplexity("perplexity", 0.1),
          entry("divergence", 0.2, by="divergence"), by_perplexity("better", 0.3)],
         {}, ["better", "divergence", "perplexity", "proxy", "unknown", "no better", "worse"]),
        # of equal gains that of the asked family and size comes first
        ([entry("b other", families=("opt",)), entry("a large", parameters=10**6), entry("same"),
          entry("a other", families=("opt",))],
         {"family": "llama", "parameters": 100}, ["same", "a other", "b other", "a large"]),
    ],
)  # fmt: skip
def test_the_order_is_by_pattern_then_by_what_was_measured_then_by_model(entries, wanted, expected):
    assert order(*entries, **wanted) == expected


def test_a_scope_that_is_asked_for_comes_before_a_gain_and_counts_nothing_if_it_is_not():
    entries = [entry("layer", 0.3, scope="layer"), entry("row", 0.1, scope="row")]
    for pattern in (None, "0.5", "0.50", "5e-1"):
        found = rank(entries, Wanted.parse(pattern, "row"))
        unasked = rank(entries, Wanted.parse(pattern))

        assert [(m.entry.id, m.fits) for m in found] == [("row", True), ("layer", False)]
        assert [(m.entry.id, m.fits) for m in unasked] == [("layer", True), ("row", True)]
    never = Wanted(pattern=Pattern.parse("2:4"), scope=Scope.LAYER, scope_matters=True)
    assert not any(m.fits for m in rank(entries, never))
    with pytest.raises(InvalidInput, match="scope 'column' is not one of"):
        Wanted.parse(scope="column")


@pytest.mark.parametrize(
    ("found_on", "asked", "expected"),
    [
        (("llama", 100), (None, None), 0.2),
        (("llama", 100), ("llama", 100), 0.2),
        (("gemma3_text", 100), ("gemma3", 100), 0.2),
        (("gemma2", 100), ("gemma3_text", 100), 0.2 * 0.95),
        (("gemma2", 100), ("llama", 100), 0.2 * 0.85),
        (("llama", 100), ("llama", 800), 0.2 * 0.98**3),
        (("llama", None), ("llama", 100), 0.2 * 0.85),
        (("qwen2", 400), ("llama", 100), 0.2 * 0.85 * 0.98**2),
    ],
)
def test_another_family_and_each_doubling_of_the_size_leave_less_of_a_gain(
    found_on, asked, expected
):
    entries = [entry("a", 0.2, families=(found_on[0],), parameters=found_on[1])]
    (match,) = rank(entries, Wanted.parse(family=asked[0], parameters=asked[1]))

    assert match.expected == pytest.approx(expected, rel=1e-12)


def test_of_nothing_nothing_is_expected_and_a_loss_is_no_smaller_on_another_model():
    several = entry("several", 0.2, families=("qwen2", "gemma2", "llama"))
    found = rank(
        [entry("lost", -0.1), entry("unknown", None), several], Wanted.parse(family="gemma3_text")
    )
    expected = {match.entry.id: match.expected for match in found}

    assert expected["lost"] == pytest.approx(-0.1)
    assert expected["unknown"] is None
    assert expected["several"] == pytest.approx(0.2 * 0.95)  # by the nearest of its models


def test_what_failed_on_the_asked_family_goes_last_for_it():
    failed = entry(
        "failed", 0.4, by="perplexity", elsewhere={"gemma3_text": saved(-0.1, "perplexity")}
    )
    others = [entry("other", 0.1, by="perplexity"), entry("unknown", None)]

    assert order(failed, *others, family="llama") == ["failed", "other", "unknown"]
    assert order(failed, *others, family="gemma3_text") == ["other", "unknown", "failed"]
    assert order(failed, *others, family="gemma3") == ["other", "unknown", "failed"]
    assert order(failed, *others) == ["failed", "other", "unknown"]


def test_what_holds_on_the_asked_family_counts_in_full():
    on = [
        GainElsewhere(model=ModelFacts(name=f"o{i}", family="opt"), gain=gain)
        for i, gain in enumerate(
            [saved(0.3, "perplexity"), saved(-9.0), saved(0.19, "perplexity"), saved(0.2)]
        )
    ]
    held = replace(entry("held", 0.1, by="perplexity"), measured=tuple(on))
    first, second = rank([entry("other", 0.2, by="perplexity"), held], Wanted.parse(family="opt"))

    assert (first.entry.id, first.expected) == ("held", pytest.approx(0.19))
    assert (second.entry.id, second.expected) == ("other", pytest.approx(0.17))


def test_the_reasons_name_pattern_model_family_size_and_every_number_that_was_measured():
    found = entry(
        "a", 0.25, by="perplexity", families=("llama", "opt"), parameters=134_500_000,
        elsewhere={"gemma2": saved(-0.5, "perplexity"), "gpt2": saved(0.125)},
    )  # fmt: skip
    (match,) = rank([found], Wanted.parse("0.5", family="llama"))

    assert match.reasons == (
        "pattern 0.5, scope layer",
        "found on m-llama, llama, 134 M parameters: the family asked for",
        "found on m-opt, opt, 134 M parameters: not the family asked for",
        "where it was found, 25.0% below RIA's perplexity (m-llama + m-opt)",
        "on m-gemma2, 50.0% above RIA's perplexity",
        "on m-gpt2, 12.5% below RIA's proxy; RIA's perplexity was not measured",
    )


@pytest.mark.parametrize(
    ("changes", "wanted", "reason"),
    [
        ({"pattern": "2:4"}, {"pattern": "0.5"}, "pattern 2:4, scope row, but 0.5 is asked for"),
        ({}, {"pattern": "0.5", "scope": "row"}, "0.5, scope layer, but scope row is asked"),
        ({"families": (None,), "parameters": None}, {"family": "opt"},
         "found on m-None, unknown family, unknown size; asked for is opt"),
        ({"families": ("gemma2",)}, {"family": "gemma3"}, "a family related to the one asked for"),
        ({"share": None}, {}, "where it was found, RIA was not measured beside it (m-llama)"),
        ({"method": "wanda"}, {}, "it is the baseline wanda: the search found nothing better"),
    ],
)  # fmt: skip
def test_reason(changes, wanted, reason):
    """What speaks against an entry, or is not known of it, is said."""
    (match,) = rank([entry("a", **changes)], Wanted.parse(**wanted))

    assert any(reason in said for said in match.reasons), match.reasons


_texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12)
_numbers = st.one_of(
    st.integers(-3, 3), st.integers(), st.sampled_from([10**400, -(10**400), 1e308, 5e-324]),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), _numbers, _texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)
_measured = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    [1e308, -1e308, 5e-324, 0.0]
)
_ratings = st.lists(
    st.fixed_dictionaries(
        {"method": st.sampled_from(["crepe", "ria-row", "ria-layer"]), "trial": st.just(1)},
        optional=dict.fromkeys(("proxy", "perplexity", "divergence"), _measured),
    ),
    max_size=3,
)
_model = st.fixed_dictionaries(
    {},
    optional={
        "name": _values, "parameters": _values | _numbers, "models": _values,
        "family": st.sampled_from(["llama", "gemma2", "_text", ""]) | _values,
    },
)  # fmt: skip
_documents = st.builds(
    document,
    pattern=st.sampled_from(["0.5", "0.6", "2:4"]),
    scope=st.just("row"),
    method=_texts,
    objective=st.fixed_dictionaries(
        {}, optional={"value": _values, "relative_to_ria": _values, "direction": _values}
    ),
    confirmation=st.none() | st.builds(lambda p: {**CONFIRMED, "perplexity": p}, _measured),
    finalists=_ratings,
    baselines=_ratings,
    model=_model | st.builds(lambda models: {"models": models}, st.lists(_model, max_size=2)),
)
_targets = st.lists(
    st.fixed_dictionaries(
        {"target": _texts, "model": _model, "report": _values},
        optional={
            name: st.dictionaries(st.sampled_from(["ria", "transferred"]), _measured)
            for name in ("perplexities", "proxies")
        },
    ),
    max_size=2,
)
_wanted = st.builds(
    Wanted.parse,
    pattern=st.sampled_from([None, "0.5", "2:4"]),
    family=st.sampled_from([None, "llama", "gemma3_text", "7b"]),
    parameters=st.none() | st.integers(1, 10**400),
)


@settings(settings.get_profile("suite"))
@given(st.lists(st.tuples(_documents, _targets), max_size=4), _wanted)
def test_whatever_a_file_holds_it_is_ranked(files, wanted):
    read = [
        parsed(transfer(*targets, configuration=values) if targets else values)
        for values, targets in files
    ]
    found = rank([Entry.of(str(i), file) for i, file in enumerate(read)], wanted)

    assert sorted(match.entry.id for match in found) == sorted(map(str, range(len(files))))
    shown = [(m.entry.to_dict(), m.expected, m.reasons) for m in found]
    json.dumps(shown, allow_nan=False)
    assert all(
        found.index(a) < found.index(b)
        for a in found for b in found
        if wanted.pattern is not None and a.fits and not b.fits
    )  # fmt: skip
    for file in read:
        assert parsed(file.to_dict("s")) == file


def test_a_configuration_is_a_file_of_a_library_with_its_numbers_to_the_bit():
    found = parsed(document())

    assert found.targets == ()
    assert found.configuration.coefficients.row == 0.1 + 0.2
    assert parsed(found.to_dict("source")) == found
    assert found.to_dict("source")["format"] == "pho-configuration"


def test_so_is_a_transfer_what_of_it_does_not_count_here_is_kept_but_for_own_bests():
    found = parsed(transfer({**TARGET, "own": document()}))
    written = found.to_dict("source")

    assert found.targets[0].perplexities["transferred"] == 50.0
    assert written["source"] == "source"
    assert written["targets"] == [TARGET]
    assert parsed(json.loads(json.dumps(written))) == parsed(transfer(TARGET))
    assert parsed(transfer()) == parsed(document())  # to no model, it is its configuration


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (document(version=3), "it has format version 3, but this PHO reads version 2"),
        (transfer(version=2), "it has format version 2, but this PHO reads version 1"),
        (transfer(TARGET, configuration=transfer()), "it: configuration is not a configuration"),
        (transfer({}), r"breaks the format: targets\.0\.target"),
        (transfer(*[TARGET] * 1001), "breaks the format: targets: .* at most 1000 items"),
        (document(pattern="-0.5"), "sparsity -0.5 is not between 0 and 1"),
        (document(model={"name": float("nan")}), "it contains a value that JSON cannot represent"),
        (document(model={"name": "a\x00b"}), r"it holds the character U\+0000"),
        (document(model={"name": nested(100_000)}), "more than 100 lists and objects deep"),
        ({"format": ["pho-transfer"]}, "it is not a configuration of PHO"),
    ],
)
def test_what_breaks_a_rule_is_refused_with_the_rule(values, message):
    with pytest.raises(ConfigurationError, match=message):
        parsed(values)
    found = parsed(document(model={"name": nested(98)}))  # as deep as allowed
    assert parsed(json.loads(json.dumps(found.to_dict("s")))) == found


def test_a_folders_configurations_are_found_and_the_rest_named(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "transfer.json").write_text(json.dumps(transfer(TARGET)))
    (tmp_path / "a ü.json").write_text(json.dumps(document()))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "empty.json").touch()
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "huge.json").write_text(" " * (2**20 + 1))
    (tmp_path / "latin.json").write_bytes(b'"\xe4"')
    (tmp_path / "nan.json").write_text(json.dumps(document(model={"a": float("nan")})))
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "c.txt").write_text(json.dumps(document()))
    found, others = read_folder(tmp_path)

    assert [*found] == ["a ü.json", "b/transfer.json"]
    assert found["a ü.json"] == parsed(document())
    assert found["b/transfer.json"] == read_library_file(tmp_path / "b" / "transfer.json")
    assert len(others) == 7
    for name, said in zip(
        ("empty", "folder", "gone", "huge", "latin", "nan", "other"), others, strict=True
    ):
        assert f"{name}.json" in said


def test_what_is_no_folder_is_no_library_and_an_empty_folder_an_empty_one(tmp_path):
    assert read_folder(tmp_path) == ({}, [])
    (tmp_path / "file.json").write_text(json.dumps(document()))
    for name in ("none", "file.json"):
        with pytest.raises(ConfigurationError, match=f"{name} is no folder"):
            read_folder(tmp_path / name)
