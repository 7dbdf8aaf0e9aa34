"""The ranking of a library's configurations, by hand; and the files that they come from."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pho_service.errors import ConfigurationError, InvalidInput
from pho_service.library import (
    Entry,
    Gain,
    LibraryFile,
    MeasuredElsewhere,
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


def document(**changes: Any) -> dict[str, Any]:
    """A configuration's file."""
    score = {
        "row": 0.1 + 0.2, "column": 0.7, "neighbourhood": 0.0, "kernel_size": 3,
        "activation_exponent": 0.5,
    }  # fmt: skip
    return {
        "format": "pho-configuration", "version": 2, "method": "crepe", "pattern": "0.5",
        "scope": "layer", "coefficients": score, **changes,
    }  # fmt: skip


def transfer(*targets: Any, **changes: Any) -> dict[str, Any]:
    """A transfer's file."""
    return {
        "format": "pho-transfer", "version": 1, "source": "c.json", "configuration": document(),
        "targets": [*targets], **changes,
    }  # fmt: skip


def parsed(values: Any) -> LibraryFile:
    """What must be a file of a library."""
    return parse_library_file(values, "it")


def rated(method: str, **numbers: float) -> dict[str, Any]:
    """What was measured of one candidate."""
    return {"method": method, "trial": 1, **numbers}


def entry(
    name: str,
    share: float | None = 0.2,
    *,
    by: Any = "proxy",
    pattern: str = "0.5",
    scope: str | None = None,
    families: tuple[str | None, ...] = ("llama",),
    parameters: int | None = 100,
    elsewhere: Mapping[str, Gain] | None = None,
    method: str = "crepe",
) -> Entry:
    """An entry that saved this share of RIA's proxy, or perplexity."""
    models = [ModelFacts(name=f"m-{f}", family=f, parameters=parameters) for f in families]
    return Entry(
        id=name,
        method=method,
        pattern=Pattern.parse(pattern, scope),
        models=tuple(models),
        gain=None if share is None else saved(share, by),
        measured=tuple(
            MeasuredElsewhere(model=ModelFacts(name=f"m-{family}", family=family), gain=gain)
            for family, gain in (elsewhere or {}).items()
        ),
    )


def saved(share: float, by: Any = "proxy") -> Gain:
    """The gain that is this share of RIA's."""
    return Gain(value=share if by == "proxy" else -math.log(1 - share), by=by)


def order(*entries: Entry, **wanted: Any) -> list[str]:
    """The ids, best first."""
    return [match.entry.id for match in rank(entries, Wanted.parse(**wanted))]


# ---------------------------------------------------------------------------- the gain


@pytest.mark.parametrize(
    ("changes", "share", "by"),
    [
        # Of the two RIAs the last, of the widest scope, counts: 1 - 18/24.
        (
            {
                "confirmation": CONFIRMED,
                "candidates": [rated("crepe", perplexity=18.0, divergence=9.0)],
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
                "candidates": [rated("crepe", perplexity=18.0, divergence=0.3)],
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
        # It is worse than RIA: 1 - 24/18.
        (
            {"confirmation": {**CONFIRMED, "perplexity": 24.0},
             "baselines": [rated("ria-layer", perplexity=18.0)]},
            -1 / 3,
            "perplexity",
        ),
        # Of several models, the mean of what it is relative to RIA on each, whatever the search's
        # own objective was: 1 - (0.9 + 0.7)/2.
        ({"objective": {"value": 0.9, "relative_to_ria": {"a": 0.9, "b": 0.7}}}, 0.2, "proxy"),
    ],
)  # fmt: skip
def test_gain(changes: dict[str, Any], share: float, by: str) -> None:
    """The gain over RIA is by perplexity, else by divergence, else by the proxy."""
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
        {"objective": {"value": True}, "baselines": [rated("ria-layer", proxy=2.0)]},
        {"objective": {"value": 10**400}, "baselines": [rated("ria-layer", proxy=2.0)]},
        {"objective": {"value": 0.03}, "baselines": [rated("ria-layer", proxy=0.0)]},
        {"objective": {"value": -0.03}, "baselines": [rated("ria-layer", proxy=0.04)]},
        {"objective": {"value": 0.03}, "baselines": [rated("ria-layer")]},
        {"objective": {"relative_to_ria": {"a": "0.5", "b": None}}},
        {"confirmation": CONFIRMED, "baselines": [rated("ria-layer", perplexity=-1.0)]},
    ],
)  # fmt: skip
def test_no_gain(changes: dict[str, Any]) -> None:
    """Where RIA, or the configuration, has no number that can be compared, nothing is known."""
    assert measured_gain(parsed(document(**changes)).configuration) is None


@pytest.mark.parametrize(
    ("values", "share", "by"),
    [
        ({"perplexities": {"ria": 40.0, "transferred": 50.0},
          "proxies": {"ria": 2.0, "transferred": 1.0}}, -0.25, "perplexity"),
        ({"proxies": {"ria": 2.0, "transferred": 1.0}}, 0.5, "proxy"),
        ({"perplexities": {"ria": 40.0}, "proxies": {"ria": 2.0, "transferred": None}}, None, ""),
        ({}, None, ""),
    ],
)  # fmt: skip
def test_transferred_gain(values: dict[str, Any], share: float | None, by: str) -> None:
    """On another model the perplexity counts, else the proxy."""
    gain = transferred_gain(TransferTarget(target="t", **values))

    assert (gain is None) == (share is None)
    if gain is not None:
        assert gain.by == by
        assert gain.share == pytest.approx(share)


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (saved(0.25, "perplexity"), "25.0% below RIA's perplexity"),
        (saved(-0.25, "perplexity"), "25.0% above RIA's perplexity"),
        (saved(0.1, "divergence"), "10.0% below RIA's perplexity, as its divergence from"),
        (saved(0.5), "50.0% below RIA's proxy; RIA's perplexity was not measured"),
        (saved(0.0, "perplexity"), "RIA's perplexity"),
    ],
)  # fmt: skip
def test_a_gain_names_its_share_its_direction_and_what_was_measured(gain: Gain, said: str) -> None:
    assert str(gain).startswith(said)


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"name": "org/Name-1B", "family": "llama", "parameters": 5}, ("Name-1B", "llama", 5)),
        ({}, ("unknown", None, None)),
        ({"name": None, "family": "", "parameters": 0}, ("unknown", None, None)),
        ({"name": "/", "family": 7, "parameters": -3}, ("unknown", None, None)),
        ({"name": 12, "family": ["llama"], "parameters": "5"}, ("12", None, None)),
        ({"name": "m", "parameters": True}, ("m", None, None)),
        ({"name": "m", "parameters": 1.5e9}, ("m", None, None)),
        ({"name": "m", "parameters": 10**15}, ("m", None, 10**15)),
        ({"name": "m", "parameters": 10**400}, ("m", None, None)),
    ],
)
def test_model_facts(given: dict[str, Any], facts: tuple[str, str | None, int | None]) -> None:
    """What is no name, family or count of parameters is unknown."""
    found = ModelFacts.of(given)

    assert (found.name, found.family, found.parameters) == facts
    assert found.parameters is not True


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ({"name": "a/one"}, ["one"]),
        ({"name": "joint", "models": [{"name": "a/one"}, {"name": "a/two"}]}, ["one", "two"]),
        ({"name": "a/one", "models": [5, "x"]}, ["one"]),
        ({"name": "a/one", "models": {"name": "two"}}, ["one"]),
        ({"name": "a/one", "models": 5}, ["one"]),
    ],
)
def test_models_of_an_entry(model: dict[str, Any], names: list[str]) -> None:
    """An entry was found on one model, or on those of a joint search."""
    found = Entry.of("1", parsed(document(model=model)))

    assert [each.name for each in found.models] == names


def test_entry_of_a_transfer() -> None:
    """An entry knows what its configuration was worth elsewhere, where that was measured."""
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


# --------------------------------------------------------------------------- the order


def test_the_asked_pattern_comes_first_however_little_it_gained_then_others_nearest_first() -> None:
    found = order(
        entry("far", 0.9, pattern="0.9"), entry("group", 0.9, pattern="2:4"),
        entry("near", 0.1, pattern="0.6"), entry("worse", -0.1), entry("nearest", pattern="0.55"),
        pattern="0.5",
    )  # fmt: skip

    assert found == ["worse", "nearest", "near", "far", "group"]


def test_groups_of_another_size() -> None:
    """To N:M, another N:M is nearer than any ratio, and 2:4 is not 4:8."""
    found = order(
        entry("ratio", 0.9, pattern="0.5"), entry("3:4", 0.1, pattern="3:4"),
        entry("4:8", 0.1, pattern="4:8"), entry("2:4", 0.1, pattern="2:4"), pattern="2:4",
    )  # fmt: skip

    assert found == ["2:4", "4:8", "3:4", "ratio"]


def test_the_same_pattern_in_other_words() -> None:
    (match,) = rank([entry("a", pattern="0.50")], Wanted.parse("5e-1"))

    assert match.fits


def test_scope_only_if_asked() -> None:
    """A scope that is asked for comes before a gain; one that is not asked for counts nothing."""
    entries = [entry("layer", 0.3, scope="layer"), entry("row", 0.1, scope="row")]
    fitting = [m.entry.id for m in rank(entries, Wanted.parse("0.5", "row")) if m.fits]

    assert order(*entries, pattern="0.5") == ["layer", "row"]
    assert order(*entries, pattern="0.5", scope="row") == ["row", "layer"]
    assert fitting == ["row"]
    assert all(m.fits for m in rank(entries, Wanted.parse("0.5")))


def test_scope_without_a_pattern() -> None:
    """A scope can be asked for alone, and one that a pattern never has: nothing fits then."""
    entries = [entry("layer", 0.3, scope="layer"), entry("row", 0.1, scope="row")]

    assert order(*entries, scope="row") == ["row", "layer"]
    assert [m.fits for m in rank(entries, Wanted.parse(scope="row"))] == [True, False]
    never = Wanted(pattern=Pattern.parse("2:4"), scope=Scope.LAYER, scope_matters=True)
    assert not any(m.fits for m in rank(entries, never))
    with pytest.raises(InvalidInput, match="scope 'column' is not one of"):
        Wanted.parse(scope="column")


def test_what_was_measured() -> None:
    """Perplexity, and divergence with it, comes before the proxy; then unknown; then no better."""
    found = order(
        entry("no better", 0.0, by="perplexity"), entry("worse", -0.5), entry("unknown", None),
        entry("proxy", 0.9), entry("perplexity", 0.1, by="perplexity"),
        entry("divergence", 0.2, by="divergence"), entry("better", 0.3, by="perplexity"),
    )  # fmt: skip

    assert found == [
        "better", "divergence", "perplexity", "proxy", "unknown", "no better", "worse",
    ]  # fmt: skip


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
    found_on: tuple[str | None, int | None],
    asked: tuple[str | None, int | None],
    expected: float,
) -> None:
    entries = [entry("a", 0.2, families=(found_on[0],), parameters=found_on[1])]
    (match,) = rank(entries, Wanted.parse(family=asked[0], parameters=asked[1]))

    assert match.expected == pytest.approx(expected, rel=1e-12)


def test_of_nothing_nothing_is_expected_and_a_loss_is_no_smaller_on_another_model() -> None:
    lost, unknown = rank(
        [entry("lost", -0.1), entry("unknown", None)], Wanted.parse(family="gemma")
    )[::-1]

    assert lost.expected == pytest.approx(-0.1)
    assert unknown.expected is None


def test_what_was_found_on_several_models_is_as_near_as_the_nearest_of_them() -> None:
    (match,) = rank(
        [entry("a", 0.2, families=("qwen2", "gemma2", "llama"))], Wanted.parse(family="gemma3_text")
    )

    assert match.expected == pytest.approx(0.2 * 0.95)


def test_family_and_size_order() -> None:
    """Of equal gains, that of the asked family and size comes first; of equal ones, by id."""
    found = order(
        entry("b other", families=("opt",)), entry("a large", parameters=10**6), entry("same"),
        entry("a other", families=("opt",)), family="llama", parameters=100,
    )  # fmt: skip

    assert found == ["same", "a other", "b other", "a large"]


def test_failed_transfer() -> None:
    """What failed on the asked family goes last for it, and is first where it was found."""
    failed = entry(
        "failed", 0.4, by="perplexity", elsewhere={"gemma3_text": saved(-0.1, "perplexity")}
    )
    others = [entry("other", 0.1, by="perplexity"), entry("unknown", None)]

    assert order(failed, *others, family="llama") == ["failed", "other", "unknown"]
    assert order(failed, *others, family="gemma3_text") == ["other", "unknown", "failed"]
    assert order(failed, *others, family="gemma3") == ["other", "unknown", "failed"]
    assert order(failed, *others) == ["failed", "other", "unknown"]


def test_good_transfer() -> None:
    """What holds on the asked family counts in full, and before what was not measured there."""
    held = entry("held", 0.1, by="perplexity", elsewhere={"opt": saved(0.19, "perplexity")})
    first, second = rank([entry("other", 0.2, by="perplexity"), held], Wanted.parse(family="opt"))

    assert (first.entry.id, first.expected) == ("held", pytest.approx(0.19))
    assert (second.entry.id, second.expected) == ("other", pytest.approx(0.17))


def test_worst_transfer() -> None:
    """Of several models of the family the worst perplexity counts, and no proxy beside it."""
    on = [
        MeasuredElsewhere(model=ModelFacts(name=f"o{i}", family="opt"), gain=gain)
        for i, gain in enumerate(
            [saved(0.3, "perplexity"), saved(-9.0), saved(0.1, "perplexity"), saved(0.2)]
        )
    ]
    several = Entry(
        id="a", method="crepe", pattern=Pattern.parse("0.5"), models=(), gain=None,
        measured=tuple(on),
    )  # fmt: skip
    (match,) = rank([several], Wanted.parse(family="opt"))

    assert match.expected == pytest.approx(0.1)


# ------------------------------------------------------------------------- the reasons


def test_the_reasons_name_pattern_model_family_size_and_every_number_that_was_measured() -> None:
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
def test_reason(changes: dict[str, Any], wanted: dict[str, Any], reason: str) -> None:
    """What speaks against an entry, or is not known of it, is said."""
    (match,) = rank([entry("a", **changes)], Wanted.parse(**wanted))

    assert any(reason in said for said in match.reasons), match.reasons


# ----------------------------------------------------------------------- any file at all

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
    candidates=_ratings,
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
def test_rank_takes_all(files: list[tuple[Any, Any]], wanted: Wanted) -> None:
    """Whatever a file that is taken holds, it is ranked once, with numbers that JSON has."""
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


# ---------------------------------------------------------------------------- the files


def test_a_configuration_is_a_file_of_a_library_with_its_numbers_to_the_bit() -> None:
    found = parsed(document())

    assert found.targets == ()
    assert found.configuration.coefficients.row == 0.1 + 0.2
    assert parsed(found.to_dict("source")) == found
    assert found.to_dict("source")["format"] == "pho-configuration"


def test_so_is_a_transfer_what_of_it_does_not_count_here_is_kept() -> None:
    found = parsed(transfer(TARGET))
    written = found.to_dict("source")

    assert found.targets[0].perplexities["transferred"] == 50.0
    assert written["source"] == "source"
    assert written["targets"] == [TARGET]
    assert parsed(json.loads(json.dumps(written))) == found


def test_own_best_is_left_out() -> None:
    found = parsed(transfer({**TARGET, "own": document()}))

    assert found.to_dict("source")["targets"] == [TARGET]


def test_a_transfer_to_no_model_is_its_configuration() -> None:
    assert parsed(transfer()) == parsed(document())


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (document(version=3), "it has format version 3, but this PHO reads version 2"),
        (transfer(version=2), "it is a transfer of format version 2, but this PHO reads version 1"),
        (transfer(TARGET, configuration=transfer()), "it: configuration is not a configuration"),
        (transfer(TARGET, configuration=5), "breaks the format: configuration"),
        (transfer({}), r"breaks the format: targets\.0\.target"),
        (transfer(TARGET, more=1), "breaks the format: more"),
        (transfer(*[TARGET] * 1001), "breaks the format: targets: .* at most 1000 items"),
        (document(pattern="-0.5"), "sparsity -0.5 is not between 0 and 1"),
        (document(model={"name": float("nan")}), "it contains a value that JSON cannot represent"),
        (document(model={"\udfff": 1}), "it contains a value that JSON cannot represent"),
        (document(model={"name": "a\x00b"}), r"it holds the character U\+0000"),
        (document(model={"name": nested(100)}), "more than 100 lists and objects deep"),
        (document(model={"name": nested(100_000)}), "more than 100 lists and objects deep"),
        (None, "it is not a configuration of PHO"),
        ({"format": ["pho-transfer"]}, "it is not a configuration of PHO"),
    ],
)
def test_refused(values: Any, message: str) -> None:
    """What is of another version, or breaks a rule, is refused, and the message names it."""
    with pytest.raises(ConfigurationError, match=message):
        parsed(values)


def test_what_is_nested_as_deep_as_allowed_can_be_written_too() -> None:
    found = parsed(document(model={"name": nested(98)}))

    assert parsed(json.loads(json.dumps(found.to_dict("s")))) == found


def test_folder(tmp_path: Path) -> None:
    """A folder's configurations are found below it; what else there is, is named."""
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


@pytest.mark.parametrize("name", ["none", "file.json"])
def test_what_is_no_folder_is_no_library(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.json").write_text(json.dumps(document()))

    with pytest.raises(ConfigurationError, match=f"{name} is no folder"):
        read_folder(tmp_path / name)


def test_an_empty_folder_is_an_empty_library(tmp_path: Path) -> None:
    assert read_folder(tmp_path) == ({}, [])
