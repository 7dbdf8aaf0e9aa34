"""
Where the linears of each family's blocks are, as transformers' own classes have them.

One function for each kind of attention and of feed-forward; the tests compare them with what
transformers builds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pho_service.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """
    One prunable linear of a block, or the same matrix of all experts of a mixture.

    Attributes:
        name: Inside of its block: ``self_attn.q_proj``.
        out_features: Output rows.
        in_features: Input channels.
        reads: Names the input that it shares with others: one norm and one second moment
            are gathered for each.
        count: How many there are: the experts of a mixture, 1 elsewhere.
        share: Share of the tokens that reach each of them; 1 but for experts.
    """

    name: str
    out_features: int
    in_features: int
    reads: str
    count: int = 1
    share: float = 1.0

    @property
    def weights(self) -> int:
        """Number of weights, of all experts."""
        return self.count * self.out_features * self.in_features


class Fields:
    """A configuration's fields, by the names that families give them."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self._name = name
        self._values = values

    def number(self, *names: str, default: int | None = None) -> int:
        """
        The first of the fields that is there.

        Raises:
            InvalidInput: None is, and there is no default; or it is not a whole number above 0.
        """
        for name in names:
            value = self._values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
                raise InvalidInput(
                    f"{self._name}: {name}={value!r} in its configuration is not a whole number "
                    "above 0, so nothing can be planned for it. Check the file."
                )
            return value
        if default is None:
            raise InvalidInput(
                f"{self._name}: its configuration has no {names[0]}, so its size is not known. "
                "Check that config.json is that of a language model of transformers."
            )
        return default

    def flag(self, name: str, *, default: bool) -> bool:
        """A field that is true or false."""
        value = self._values.get(name)
        return default if value is None else bool(value)

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers; empty if it is not there."""
        value = self._values.get(name) or []
        return [int(each) for each in value] if isinstance(value, list) else []

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        hidden, heads = self.number("hidden_size", "n_embd"), self.heads
        return self.number("head_dim", default=max(1, hidden // heads))

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.number("num_attention_heads", "n_head")

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.number("num_key_value_heads", default=self.heads)


def _linear(name: str, out: int, width: int, reads: str) -> LinearShape:
    return LinearShape(name=name, out_features=out, in_features=width, reads=reads)


def _attention(config: Fields) -> list[LinearShape]:
    """Queries, keys, values and output, as LLaMA has them."""
    hidden, inner = config.number("hidden_size"), config.heads * config.head_dim
    keys = config.key_heads * config.head_dim
    return [
        _linear("self_attn.q_proj", inner, hidden, "attention"),
        _linear("self_attn.k_proj", keys, hidden, "attention"),
        _linear("self_attn.v_proj", keys, hidden, "attention"),
        _linear("self_attn.o_proj", hidden, inner, "output"),
    ]


def _latent_attention(config: Fields) -> list[LinearShape]:
    """DeepSeek's: queries, keys and values through narrow layers."""
    hidden, heads = config.number("hidden_size"), config.heads
    rope, nope = config.number("qk_rope_head_dim"), config.number("qk_nope_head_dim")
    values, latent = config.number("v_head_dim"), config.number("kv_lora_rank")
    rank = config.number("q_lora_rank", default=0)
    queries = (
        [
            _linear("self_attn.q_a_proj", rank, hidden, "attention"),
            _linear("self_attn.q_b_proj", heads * (nope + rope), rank, "queries"),
        ]
        if rank
        else [_linear("self_attn.q_proj", heads * (nope + rope), hidden, "attention")]
    )
    return [
        *queries,
        _linear("self_attn.kv_a_proj_with_mqa", latent + rope, hidden, "attention"),
        _linear("self_attn.kv_b_proj", heads * (nope + values), latent, "keys"),
        _linear("self_attn.o_proj", hidden, heads * values, "output"),
    ]


def _gated(hidden: int, width: int, prefix: str = "mlp") -> list[LinearShape]:
    """A feed-forward with a gate, as LLaMA has it."""
    return [
        _linear(f"{prefix}.gate_proj", width, hidden, prefix),
        _linear(f"{prefix}.up_proj", width, hidden, prefix),
        _linear(f"{prefix}.down_proj", hidden, width, f"{prefix}.down"),
    ]


def _experts(config: Fields, count: int, width: int) -> list[LinearShape]:
    """The experts of a mixture, each with inputs of its own."""
    share = min(1.0, config.number("num_experts_per_tok", default=count) / count)
    return [
        LinearShape(
            name=name, out_features=out, in_features=width_in, reads=reads, count=count, share=share
        )
        for name, out, width_in, reads in (
            ("mlp.experts.gate_proj", width, config.number("hidden_size"), "experts"),
            ("mlp.experts.up_proj", width, config.number("hidden_size"), "experts"),
            ("mlp.experts.down_proj", config.number("hidden_size"), width, "experts.down"),
        )
    ]


def _plain(hidden: int, width: int, first: str, second: str) -> list[LinearShape]:
    """A feed-forward of two layers."""
    return [_linear(first, width, hidden, "mlp"), _linear(second, hidden, width, "mlp.down")]


def _llama(config: Fields) -> list[list[LinearShape]]:
    hidden = config.number("hidden_size")
    block = [*_attention(config), *_gated(hidden, config.number("intermediate_size"))]
    return [block] * config.number("num_hidden_layers")


def _phi3(config: Fields) -> list[list[LinearShape]]:
    hidden, width = config.number("hidden_size"), config.number("intermediate_size")
    query, key, _, output = _attention(config)
    merged = query.out_features + 2 * key.out_features
    block = [
        _linear("self_attn.qkv_proj", merged, hidden, "attention"),
        output,
        _linear("mlp.gate_up_proj", 2 * width, hidden, "mlp"),
        _linear("mlp.down_proj", hidden, width, "mlp.down"),
    ]
    return [block] * config.number("num_hidden_layers")


def _phi(config: Fields) -> list[list[LinearShape]]:
    hidden, width = config.number("hidden_size"), config.number("intermediate_size")
    query, key, value, output = _attention(config)
    dense = _linear("self_attn.dense", output.out_features, output.in_features, "output")
    block = [query, key, value, dense, *_plain(hidden, width, "mlp.fc1", "mlp.fc2")]
    # Attention and feed-forward stand side by side, behind one norm.
    block[4] = _linear("mlp.fc1", width, hidden, "attention")
    return [block] * config.number("num_hidden_layers")


def _opt(config: Fields) -> list[list[LinearShape]]:
    hidden, width = config.number("hidden_size"), config.number("ffn_dim")
    block = [
        *(_linear(f"self_attn.{name}_proj", hidden, hidden, "attention") for name in "qkv"),
        _linear("self_attn.out_proj", hidden, hidden, "output"),
        *_plain(hidden, width, "fc1", "fc2"),
    ]
    return [block] * config.number("num_hidden_layers")


def _gpt2(config: Fields) -> list[list[LinearShape]]:
    hidden = config.number("n_embd", "hidden_size")
    block = [
        _linear("attn.c_attn", 3 * hidden, hidden, "attention"),
        _linear("attn.c_proj", hidden, hidden, "output"),
        *_plain(hidden, config.number("n_inner", default=4 * hidden), "mlp.c_fc", "mlp.c_proj"),
    ]
    return [block] * config.number("n_layer", "num_hidden_layers")


def _gpt_neox(config: Fields) -> list[list[LinearShape]]:
    hidden, width = config.number("hidden_size"), config.number("intermediate_size")
    block = [
        _linear("attention.query_key_value", 3 * hidden, hidden, "attention"),
        _linear("attention.dense", hidden, hidden, "output"),
        *_plain(hidden, width, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ]
    return [block] * config.number("num_hidden_layers")


def _falcon(config: Fields) -> list[list[LinearShape]]:
    hidden, heads = config.number("hidden_size"), config.heads
    head = hidden // heads
    if config.flag("new_decoder_architecture", default=False):
        merged = (2 * config.number("num_kv_heads", default=heads) + heads) * head
    elif config.flag("multi_query", default=True):
        merged = hidden + 2 * head
    else:
        merged = 3 * hidden
    width = config.number("ffn_hidden_size", default=4 * hidden)
    block = [
        _linear("self_attention.query_key_value", merged, hidden, "attention"),
        _linear("self_attention.dense", hidden, hidden, "output"),
        *_plain(hidden, width, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ]
    return [block] * config.number("num_hidden_layers")


def _mixtral(config: Fields) -> list[list[LinearShape]]:
    experts = _experts(
        config,
        config.number("num_local_experts", "num_experts"),
        config.number("intermediate_size"),
    )
    return [[*_attention(config), *experts]] * config.number("num_hidden_layers")


def _qwen_moe(config: Fields) -> list[list[LinearShape]]:
    hidden = config.number("hidden_size")
    width = config.number("moe_intermediate_size")
    count = config.number("num_experts", "num_local_experts")
    step, dense = config.number("decoder_sparse_step", default=1), config.numbers("mlp_only_layers")
    shared = config.number("shared_expert_intermediate_size", default=0)
    blocks = []
    for layer in range(config.number("num_hidden_layers")):
        if layer in dense or (layer + 1) % step:
            feed = _gated(hidden, config.number("intermediate_size"))
        else:
            feed = _experts(config, count, width)
            feed += _gated(hidden, shared, "mlp.shared_expert") if shared else []
        blocks.append([*_attention(config), *feed])
    return blocks


def _deepseek(config: Fields) -> list[list[LinearShape]]:
    hidden, width = config.number("hidden_size"), config.number("moe_intermediate_size")
    shared = config.number("n_shared_experts", default=0)
    dense = config.number("first_k_dense_replace", default=0)
    blocks = []
    for layer in range(config.number("num_hidden_layers")):
        if layer < dense:
            feed = _gated(hidden, config.number("intermediate_size"))
        else:
            feed = _experts(config, config.number("n_routed_experts"), width)
            feed += _gated(hidden, shared * width, "mlp.shared_experts") if shared else []
        blocks.append([*_latent_attention(config), *feed])
    return blocks


@dataclass(frozen=True, kw_only=True)
class Family:
    """
    Attributes:
        blocks: The linears of each block.
        tied: Whether head and embedding are one tensor if the configuration does not say.
        positions: Learned position embeddings beyond the longest window; None if there are none.
        norms: Norms of a block, as wide as its hidden states.
        head_norms: Whether queries and keys have norms of their own.
        defaults: Fields that published configurations leave out, as transformers has them.
    """

    blocks: Callable[[Fields], list[list[LinearShape]]]
    tied: bool = False
    positions: int | None = None
    norms: int = 2
    head_norms: bool = False
    defaults: Mapping[str, Any] | None = None


_GEMMA3 = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}  # fmt: skip

# Tensors that an activation in plain operations keeps; others keep their input alone.
ACTIVATIONS = {"gelu_new": 2, "gelu_fast": 5}

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2"), Family(blocks=_llama)),
    "qwen3": Family(blocks=_llama, head_norms=True),
    "gemma": Family(blocks=_llama, tied=True),
    "gemma2": Family(blocks=_llama, tied=True, norms=4),
    "gemma3_text": Family(blocks=_llama, tied=True, norms=4, head_norms=True, defaults=_GEMMA3),
    "phi3": Family(blocks=_phi3),
    "phi": Family(blocks=_phi),
    "opt": Family(blocks=_opt, tied=True, positions=2),
    "gpt2": Family(blocks=_gpt2, tied=True, positions=0),
    "gpt_neox": Family(blocks=_gpt_neox),
    "falcon": Family(blocks=_falcon, tied=True),
    "mixtral": Family(blocks=_mixtral),
    "qwen2_moe": Family(blocks=_qwen_moe),
    "qwen3_moe": Family(blocks=_qwen_moe, head_norms=True),
    "deepseek_v3": Family(blocks=_deepseek),
}
