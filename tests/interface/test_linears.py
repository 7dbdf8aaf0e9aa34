"""Which linears, from Python: the same keywords for a search, an objective and a comparison."""

import optuna
import pytest

import pho_service as pho

SOME = {"ignore": "*.o_proj", "sparsities": {"*.down_proj": 0.25}}


def test_some_linears(tiny_llama, bundle, tmp_path):
    """What a search leaves out is left out of its table, an objective, a comparison, a pruning."""
    found = pho.search(
        bundle, "0.5", preset="score", model=tiny_llama, trials=12, finalists=1, **SOME
    )
    study = optuna.create_study()
    study.optimize(pho.objective(bundle, "0.5", preset="score", **SOME), n_trials=1)
    compared = pho.compare(
        tiny_llama, bundle.tokenizer, "0.5", bundle=bundle, report=bundle.text.held_out,
        configurations={"found": found},
    )  # fmt: skip
    wanda = {row.method: row.perplexity for row in compared.rows}["wanda"]
    pruned = pho.prune(tiny_llama, found, bundle)
    pho.save(tiny_llama, bundle.tokenizer, pruned, tmp_path / "pruned")
    modules = dict(tiny_llama.named_modules())

    assert {row.method: row.perplexity for row in found.table}["wanda"] == pytest.approx(wanda)
    assert pho.configuration(study, bundle).steps == found.configuration.steps
    assert {row.sparsity for row in compared.rows if row.scope == "layer"} == {pruned.sparsity}
    assert not any(name.endswith("o_proj") for name in pruned.layers)
    assert float((modules["model.layers.0.mlp.down_proj"].weight == 0).float().mean()) == 0.25
    assert bool(modules["model.layers.0.self_attn.o_proj"].weight.all())
