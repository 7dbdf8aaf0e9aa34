"""What a job takes: the table of published models, and what would make a job fit."""

import pytest

from pho_service.errors import InvalidInput
from pho_service.planning.costs import CARDS, named_machine
from pho_service.planning.plan import plan_job
from pho_service.planning.shapes import Header, TensorHeader, model_shapes
from pho_service.spec.document import format_bytes, format_count
from pho_service.spec.job import JobSpec
from pho_service.spec.recovery import WRITTEN_AT_ONCE
from storage.records import StageKind

GIB = 2**30
H100 = CARDS["H100"]
LLAMA = {
    "model_type": "llama", "dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA_70B = LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "model_type": "mixtral", "intermediate_size": 14336, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
}  # fmt: skip
SMALL = LLAMA | {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip


def header(config):
    hidden, width = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    feed = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    experts = config.get("num_local_experts")
    places = [f"mlp.experts.{i}" for i in range(experts)] if experts else ["mlp"]
    block |= {f"{place}.{name}": shape for place in places for name, shape in feed.items()}
    block |= {"mlp.gate": (experts, hidden)} if experts else {}
    tensors = {
        f"model.layers.{i}.{name}": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in block.items()
    }
    tensors |= {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    if not config.get("tie_word_embeddings"):
        tensors["lm_head"] = tensors["model.embed_tokens"]
    return Header(
        config=config, tensors={f"{n}.weight": TensorHeader(s, "BF16") for n, s in tensors.items()}
    )


def planned(config=LLAMA, machine=H100, **fields):
    asked = {"model": "org/m", "pattern": "0.5", "preset": "score", "minutes": None, **fields}
    spec = JobSpec.model_validate(asked)
    return plan_job(spec, model_shapes("org/m", header(config)), machine)


def test_a_cut_is_planned_with_its_copy_its_size_and_its_speed():
    cut = planned(pattern="structured:20%", preset="best", confirm={"finalists": 3})
    whole = planned()
    kinds = [stage.kind for stage in cut.stages]
    answer = cut.to_dict()["pruned"]
    smaller = planned(pattern="structured:20%", preset="best", confirm={"finalists": 1})

    assert cut.fits
    assert kinds == [StageKind.CALIBRATE] * 3 + [
        StageKind.SEARCH, StageKind.PERPLEXITY, StageKind.PRUNE, StageKind.PRUNE,
    ]  # fmt: skip
    measuring = cut.stages[kinds.index(StageKind.PERPLEXITY)]
    assert measuring.peak.device > 2 * whole.shapes.bytes()  # a copy beside the model
    assert smaller.seconds[1] < cut.seconds[1]
    assert smaller.peak.disk < cut.peak.disk
    assert 0.79 < answer["saved_bytes"] / whole.shapes.bytes() < 0.82  # the embedding stays
    assert answer["times_smaller"] == whole.shapes.bytes() / answer["saved_bytes"]
    assert whole.to_dict()["pruned"]["times_smaller"] is None


def test_a_share_of_the_file_is_planned_as_what_it_cuts_of_the_blocks():
    cut = planned(pattern="smaller:20%", preset="best", confirm={"finalists": 3})
    saved_bytes, _ = cut.pruned_bytes

    assert saved_bytes == pytest.approx(0.8 * cut.shapes.bytes(), rel=1e-6)
    assert 0.2 < cut.costs.cut_share < 0.21


@pytest.mark.parametrize("goal", ["bytes:3GB", "faster:1.2x"])
def test_what_a_goal_takes_is_found_in_a_stage_of_its_own(goal):
    of_share = {"preset": "best", "confirm": {"finalists": 2}}
    cut, share = planned(pattern=goal, **of_share), planned(pattern="structured:5%", **of_share)
    (found,) = (stage for stage in cut.stages if stage.title == f"find what {goal} takes")

    assert 0 < found.seconds[0] < cut.seconds[0]
    assert cut.steps["search"] > share.steps["search"]
    assert found.peak.device > 2 * cut.shapes.bytes()  # two models at least
    assert found.peak.disk > 2 * cut.shapes.bytes()
    assert cut.to_dict()["pruned"]["times_smaller"] is None
    assert cut.to_dict()["choice"] is None


def test_a_curve_of_cuts_takes_at_each_share_what_the_middle_one_takes_alone():
    shares = [f"structured:{share}%" for share in (10, 20, 30)]
    curve = planned(pattern=None, patterns=shares, preset="best", confirm={})
    alone = planned(pattern=shares[1], preset="best", confirm={})
    searching = (StageKind.SEARCH, StageKind.PERPLEXITY)
    points = [stage.seconds[1] for stage in curve.stages if stage.kind is StageKind.POINT]
    once = [stage.seconds[1] for stage in alone.stages if stage.kind in searching]

    assert points == pytest.approx([3 * seconds for seconds in once])
    assert curve.to_dict()["pruned"] == alone.to_dict()["pruned"]


def test_of_what_does_not_fit_a_cut_is_not_told_to_stream():
    plan = planned(LLAMA_70B, pattern="structured:20%", preset="best")

    assert not plan.fits
    assert not any("stream" in way for way in plan.ways_out)


def middle(plan):
    """Seconds between the least and the most, on the scale of both."""
    low, high = plan.seconds
    return (low * high) ** 0.5


def test_seven_billion():
    """`best` at 2:4 is planned at under 30 minutes on an H100, the score at under three."""
    best = planned(pattern="2:4", preset="best")
    score = planned()
    refined = {"repruning": "admm", "update": "least-squares"}
    alps = {"repruning": "none", "update": "alps"}

    assert best.fits
    assert middle(best) < 30 * 60
    assert score.fits
    assert middle(score) < 3 * 60
    assert all(middle(score) < middle(planned(machine=CARDS[name])) for name in ("A100", "4090"))
    assert score.peak.device < H100.memory_bytes
    assert middle(planned(steps=refined)) < middle(planned(steps=alps))


def test_seventy_billion():
    """A 70B fits one card streamed, within 64 GB of main memory, and says so if it is not."""
    whole = planned(LLAMA_70B)
    streamed = planned(LLAMA_70B, pattern="2:4", preset="best", stream=True)

    assert not whole.fits
    assert "of the H100 are needed, and it has 79.0 GiB" in whole.obstacles[0]
    assert any("stream=True" in way for way in whole.ways_out)
    assert any("2 such cards" in way for way in whole.ways_out)
    assert streamed.fits
    assert streamed.peak.host < 64e9
    assert streamed.peak.disk > 130 * GIB
    refined = {"repruning": "admm", "update": "least-squares"}
    assert planned(LLAMA_70B, stream=True, steps=refined).fits
    assert not planned(MIXTRAL).fits
    assert planned(MIXTRAL, stream=True).fits


GRAMS = {"projection_rows": 0, "samples": 8, "context_length": 256}


@pytest.mark.parametrize(
    ("fields", "gib", "way", "changed"),
    [
        ({}, 14, "stream=True", {"stream": True}),
        ({"dtype": "float32"}, 24, "dtype=bfloat16", {"dtype": "bfloat16"}),
        (
            {"calibration": GRAMS},
            30,
            "projection_rows=128",
            {"calibration": {**GRAMS, "projection_rows": 128}},
        ),
    ],
)
def test_what_is_offered_makes_it_fit(fields, gib, way, changed):
    small = H100.resized(gib * GIB)
    found = planned(machine=small, **fields)

    assert not found.fits
    assert any(way in each for each in found.ways_out)
    assert planned(machine=small, **{**fields, **changed}).fits


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({"samples": 256}, {}),
        ({"context_length": 4096}, {}),
        ({}, {"preset": "crepe-plus"}),
        ({}, {"preset": "best"}),
        ({}, {"trials": 10_000}),
        ({}, {"confirm": {"windows": 200}}),
        ({}, {"report": {"text": "r.txt"}}),
        ({}, {"report": {"text": "r.txt"}, "preset": "best"}),
    ],
)
def test_more_work_takes_longer(more, fields):
    """Each thing that is asked for beside costs time."""
    assert middle(planned(calibration=more, **fields)) > middle(planned())


def test_a_cpu_is_measured_it_has_no_gpu_memory_and_computes_in_float32():
    found = planned(SMALL, named_machine("CPU"))

    assert found.work.dtype == "float32"
    assert found.peak.device == 0
    assert found.fits
    assert found.machine.to_dict()["measured"]


def test_the_document_adds_up():
    document = planned().to_dict()

    assert document["seconds"][0] == pytest.approx(sum(s["seconds"][0] for s in document["stages"]))
    assert document["peak"]["device"] == max(s["peak"]["device"] for s in document["stages"])
    assert document["model"]["parameters"] == pytest.approx(6_738_415_616, rel=1e-3)


@pytest.mark.parametrize(("pattern", "share"), [("0.5", 0.600), ("2:4", 0.587), ("0.7", 0.479)])
def test_size(pattern, share):
    """A pruned folder is a bit a weight larger than the model; packed, as SmolLM2 was measured."""
    smollm2 = {
        "model_type": "llama", "dtype": "bfloat16", "hidden_size": 576, "vocab_size": 49152,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "tie_word_embeddings": True,
    }  # fmt: skip
    found = planned(smollm2, pattern=pattern)
    saved, packed = found.pruned_bytes

    assert found.shapes.bytes() == pytest.approx(269_060_552, rel=2e-3)
    assert saved == found.shapes.bytes() + found.shapes.prunable // 8
    assert packed / found.shapes.bytes() == pytest.approx(share, rel=0.07)


ODD = SMALL | {"hidden_size": 250, "num_attention_heads": 5, "num_key_value_heads": 5}


def shaped(shapes):
    tensors = {f"model.{n}.weight": TensorHeader(shape, "BF16") for n, shape in shapes.items()}
    return model_shapes("org/m", Header(config={"model_type": "llama"}, tensors=tensors))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (lambda: planned(calibration={"context_length": 8192}), "more than org/m can read: 4096"),
        (lambda: planned(ODD, pattern="2:4"), "250"),
        (lambda: named_machine("K80"), r"'K80' is not known\. Known are H200, H100"),
        (lambda: H100.resized(80), "a memory of 80 bytes"),  # without a unit
        # models that would take minutes to plan
        (lambda: shaped({f"layers.{i}.up_proj": (8, 8) for i in range(1001)}),
         "has 1001 layers, and 1000"),
        (lambda: shaped({f"layers.0.p{i}.up_proj": (8, 8) for i in range(5001)}),
         "has 5001 linears, and 5000"),
        (lambda: shaped({"layers.0.experts.up_proj": (10_001, 8, 8)}),
         "has 10001 experts of a linear"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_named(plan, words):
    with pytest.raises(InvalidInput, match=words):
        plan()


def test_one_calibration_and_one_model_to_write_search_and_confirmation_at_each_pattern():
    found = planned(pattern=None, patterns=["0.3", "0.5", "2:4"], confirm={"finalists": 5})
    share, kept = planned(pattern="0.3"), planned(pattern="2:4")
    repeated = ("search", "confirm")
    for stage, one, other in zip(found.stages, share.stages, kept.stages, strict=True):
        times = (2, 1) if stage.title.startswith(repeated) else (1, 0)
        expected = times[0] * one.seconds[0] + times[1] * other.seconds[0]

        assert stage.seconds[0] == pytest.approx(expected)
        assert stage.title.endswith("at each of 3 patterns") == stage.title.startswith(repeated)
    assert "at each of 6" in planned(pattern=None, target={"perplexity_rise": 0.1}).stages[3].title


def test_gguf_files_take_time_and_files_of_so_many_bytes_more_and_memory_too():
    without, typed, sized = (
        planned(prune=True, gguf=gguf).stages for gguf in ([], ["q8_0"], ["q8_0", "4.1GB"])
    )

    assert [stage.title for stage in typed] == [*(stage.title for stage in without), "export"]
    assert 2 * typed[-1].seconds[0] < sized[-1].seconds[0]
    assert typed[-1].peak.host < sized[-1].peak.host
    assert typed[-1].peak.disk < sized[-1].peak.disk


def test_each_thing_that_a_plan_has_is_of_a_kind_of_stage_in_the_order_of_the_work():
    after = {"prune": True, "recovery": {"tokens": 1000}, "validation": {"candidates": 30}}
    one = [stage.kind for stage in planned(**after).stages]
    several = [stage.kind for stage in planned(pattern=None, patterns=["0.3", "2:4"]).stages]

    assert one == sorted(one, key=lambda kind: kind.rank)
    assert {*one} == {
        StageKind.CALIBRATE, StageKind.SEARCH, StageKind.PERPLEXITY, StageKind.PRUNE
    }  # fmt: skip
    assert [*dict.fromkeys(several)] == [StageKind.CALIBRATE, StageKind.POINT, StageKind.PRUNE]
    assert one[-3:] == [StageKind.PRUNE] * 3  # pruned, recovered, saved


def test_every_perplexity_that_is_asked_for_is_planned():
    """Those that candidates are rated by, and those of a validation, cost what they cost."""
    confirm = {"finalists": 5, "windows": 64}
    proxy = planned(confirm=confirm)
    validated = planned(confirm=confirm, validation={"candidates": 1000})
    rated = planned(confirm=confirm, objective={"name": "perplexity"}, trials=1000)
    (stage,) = (each for each in validated.stages if each.title == "validate, 1000 candidates")
    (search,) = (each for each in rated.stages if each.title == "search, 1000 trials")

    assert middle(validated) > 10 * middle(proxy)
    assert search.seconds == pytest.approx(stage.seconds, rel=0.1)
    assert search.peak.device >= stage.peak.device


@pytest.mark.parametrize(("pattern", "by_default"), [("0.5", 2), ("2:4", 5)])
def test_each_finalist_that_is_pruned_in_full_costs(pattern, by_default):
    """Of five finalists two are with a share, at N:M all."""
    title = "confirm by perplexity"
    seconds = [
        next(each.seconds[0] for each in found.stages if each.title == title)
        for found in (planned(pattern=pattern, preset="best", in_full=n) for n in (None, 1, 2, 5))
    ]

    assert seconds[0] == seconds[{2: 2, 5: 3}[by_default]]
    assert seconds[1] < seconds[2] < seconds[3]


def test_what_the_dense_model_writes_to_recover_on_costs_time_and_memory():
    tokens = 512 * 128
    calibration = {"context_length": 128, "samples": 8, "projection_rows": 0}
    first, other = (
        next(
            each
            for each in planned(
                prune=True, calibration=calibration,
                recovery={"tokens": tokens, "train": "norms", "written": written},
            ).stages
            if each.title == "recover"
        )
        for written in (0, tokens)
    )  # fmt: skip

    assert 1 < middle(other) / middle(first) < 2
    dense_and_pruned = 2 * 13.5e9
    remembered = 2 * LLAMA["num_hidden_layers"] * LLAMA["hidden_size"] * 2 * WRITTEN_AT_ONCE
    assert other.peak.device > dense_and_pruned + remembered > first.peak.device


def test_a_recovery_runs_its_blocks_once_where_their_activations_fit():
    long = {"context_length": 4096, "samples": 8, "projection_rows": 0}
    fields = {"prune": True, "recovery": {"tokens": 2_000_000, "train": "norms"}}
    once, twice = (
        next(
            each
            for each in planned(machine=H100.resized(gib * GIB), calibration=long, **fields).stages
            if each.title == "recover"
        )
        for gib in (80, 36)
    )

    assert twice.peak.device < 36 * GIB < once.peak.device < 80 * GIB
    assert middle(once) < 0.85 * middle(twice)


def test_a_recovery_that_fits_no_card_is_offered_several_processes():
    fields = {"preset": "best", "pattern": "2:4"}
    trained = {"prune": True, "recovery": {"tokens": 2_000_000}}
    small = H100.resized(48 * GIB)
    whole, half, large, experts = (
        planned(config, machine, **fields, **trained)
        for config, machine in (
            (LLAMA, H100), (LLAMA, small), (LLAMA_70B, H100), (MIXTRAL, H100.resized(400 * GIB))
        )
    )  # fmt: skip

    assert any("on 2 such cards and 55.2 GiB of main memory" in way for way in whole.ways_out)
    assert any("torchrun --nproc-per-node 4" in way for way in half.ways_out)
    assert planned(machine=small, **fields).fits
    assert not any("torchrun" in way for way in large.ways_out)  # the dense one fits none
    assert not experts.fits
    assert not any("torchrun" in way or "lora" in way for way in experts.ways_out)


def test_sizes_are_in_the_largest_unit_and_counts_in_words():
    sizes = (0, 1000, 2**20 - 1, 2**33, 2**42)

    assert [*map(format_bytes, sizes)] == ["0", "1000.0 B", "1024.0 KiB", "8.0 GiB", "4.0 TiB"]
    assert [*map(format_count, (29_736, 134_515_008, 7 * 10**9))] == [
        "29.7 thousand", "135 million", "7 billion"
    ]  # fmt: skip
