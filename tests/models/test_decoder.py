"""The decoder on small random models: against `transformers`, and against itself in pieces."""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from grm_jax.distributed import RULES, make_mesh, tree_shardings
from grm_jax.errors import UsageError
from grm_jax.models import (
    DecoderConfig,
    Params,
    Rope,
    abstract_params,
    attention,
    cpu_decoder,
    dtype_name,
    family_config,
    forward,
    forward_parallel,
    init_params,
    layer_of,
    logits,
    param_axes,
    sliding_windows,
    unembed,
)
from grm_jax.models.config import GLOBAL_WINDOW
from tests.models.caches import appended, empty_own

VOCAB, WIDTH, TIME = 64, 32, 24
LENGTHS = (24, 19)
THETA, LOCAL_THETA = 5_000.0, 300.0
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_layers": 4,
    "width": WIDTH,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 48,
    "max_context": 1024,
    "rope": Rope(theta=THETA),
}
CONFIGS: dict[str, DecoderConfig] = {
    "llama": family_config("llama", **SIZES),
    "tied": family_config("llama", **SIZES, tie_embeddings=True),
    "gemma3": family_config(
        "gemma3",
        **SIZES,
        head_dim=16,
        windows=sliding_windows(4, 8, 2),
        query_scale=20**-0.5,
        rope_local=Rope(theta=LOCAL_THETA),
    ),
}


class Model(NamedTuple):
    config: DecoderConfig
    params: Params
    tokens: jax.Array
    lengths: jax.Array


def random_params(config: DecoderConfig) -> Params:
    """Parameters that give logits of several nats, with scales of norms far from one."""
    generator = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.3 * generator.standard_normal(leaf.shape)
        centre = 1.0 - config.norm_offset if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


@functools.cache
def build(name: str) -> Model:
    config = CONFIGS[name]
    tokens = jax.random.randint(jax.random.key(2), (len(LENGTHS), TIME), 0, VOCAB)
    return Model(config, random_params(config), tokens, jnp.asarray(LENGTHS))


@pytest.fixture(params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


# Compiling takes nearly all the time of these tests, and none of them measures speed.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
run = functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
run_logits = run(logits)
run_forward = run(forward)
run_parallel = run(forward_parallel)


def logprobs(model: Model, hidden: jax.Array) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(unembed(model.params, model.config, hidden)))


def whole(model: Model) -> np.ndarray:
    """Log-probabilities `[B, T, V]` of one pass."""
    hidden, _ = run_forward(model.params, model.config, model.tokens, length=model.lengths)
    return logprobs(model, hidden)


# --- against another implementation ---


def torch_weights(config: DecoderConfig, params: Params) -> dict[str, torch.Tensor]:
    """Our parameters under the names and in the shapes of the reference."""
    gemma = config.family == "gemma3"
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if gemma:
        norms = {
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    layers = jax.tree.map(np.asarray, params["layers"])
    out = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params.get("head", params["embedding"]),
    }
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf: leaf[i], layers)  # noqa: B023
        at, mlp = layer["attention"], layer["mlp"]
        here = {theirs: layer[ours]["scale"] for ours, theirs in norms.items()}
        if gemma:
            here |= {f"self_attn.{n}": at[n]["scale"] for n in ("q_norm", "k_norm")}
        keys, values = at["kv"]["kernel"]
        gate, up = mlp["gate_up"]["kernel"]
        here |= {
            "self_attn.q_proj": at["q"]["kernel"].reshape(-1, config.width),
            "self_attn.k_proj": keys.reshape(-1, config.width),
            "self_attn.v_proj": values.reshape(-1, config.width),
            "self_attn.o_proj": at["out"]["kernel"].reshape(config.width, -1),
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": mlp["down"]["kernel"],
        }
        out |= {f"model.layers.{i}.{name}.weight": array for name, array in here.items()}
    return {name: torch.tensor(np.asarray(array)) for name, array in out.items()}


def reference(config: DecoderConfig, params: Params) -> torch.nn.Module:
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }
    network: torch.nn.Module
    if config.family == "llama":
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": THETA}
        settings = transformers.LlamaConfig(**common, rope_parameters=rope)
        network = transformers.LlamaForCausalLM(settings)
    else:
        settings = transformers.Gemma3TextConfig(
            **common,
            query_pre_attn_scalar=20,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_THETA},
                "full_attention": {"rope_type": "default", "rope_theta": THETA},
            },
        )
        network = transformers.Gemma3ForCausalLM(settings)
    network.load_state_dict(torch_weights(config, params), strict=True)
    return network.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probabilities_are_those_of_the_reference(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        output = reference(model.config, model.params)(torch.tensor(np.asarray(model.tokens)))
        wanted = torch.log_softmax(output.logits.float(), dim=-1).numpy()
    assert wanted.std() > 0.5, "the model must be far from uniform for this to say anything"
    found = jax.nn.log_softmax(run_logits(model.params, model.config, model.tokens))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_window_reaches_exactly_as_far_as_it_says() -> None:
    """With a single sliding layer, a token is seen by itself and the next seven, and no further."""
    config = family_config("gemma3", **(SIZES | {"num_layers": 1}), head_dim=16, windows=(8,))
    params = random_params(config)
    tokens = build("gemma3").tokens[:1]
    before = run_logits(params, config, tokens)[0]
    after = run_logits(params, config, tokens.at[0, 5].add(1) % VOCAB)[0]
    changed = np.flatnonzero(np.any(np.asarray(before != after), axis=-1))
    np.testing.assert_array_equal(changed, np.arange(5, 13))


# --- in pieces ---


def test_pieces_with_a_cache_equal_one_pass(model: Model) -> None:
    """Rows may be of different lengths in the first piece: what follows takes up at their end."""
    cuts = (9, 10, 17, 24)
    firsts = jnp.asarray([cuts[0], cuts[0] - 5])
    short = jnp.asarray(LENGTHS) - firsts
    hidden, segment = run_forward(
        model.params, model.config, model.tokens[:, : cuts[0]], length=firsts
    )
    past = (segment,)
    found = [[np.asarray(hidden[row, : firsts[row]])] for row in range(2)]
    done = firsts
    for begin, end in itertools.pairwise(cuts):
        length = jnp.clip(short, 0, end - begin)
        short -= length
        index = jnp.minimum(done[:, None] + jnp.arange(end - begin), TIME - 1)
        piece = jnp.take_along_axis(model.tokens, index, axis=1)
        hidden, segment = run_forward(
            model.params, model.config, piece, length=length, start=done, past=past
        )
        for row in range(2):
            found[row].append(np.asarray(hidden[row, : length[row]]))
        past = (*past, segment)
        done = done + length
    assert done.tolist() == list(LENGTHS)
    wanted = whole(model)
    for row, length in enumerate(LENGTHS):
        joined = logprobs(model, jnp.asarray(np.concatenate(found[row])))
        np.testing.assert_allclose(joined, wanted[row, :length], atol=1e-4)


def test_parallel_samples_equal_one_pass_each(model: Model) -> None:
    """Three samples of each of two ragged prompts, token by token, each as if it were alone."""
    samples, steps = 3, 11
    prompts = jnp.asarray([13, 6])
    _, prefix = run_forward(model.params, model.config, model.tokens[:, :13], length=prompts)
    ends = jax.random.randint(jax.random.key(3), (2, samples, steps), 0, VOCAB)
    own = empty_own(model.config, prompts, samples, steps + 2)
    states = []
    for step in range(steps):
        state, new = run_parallel(
            model.params, model.config, ends[:, :, step], past=(prefix,), own=own
        )
        own = appended(own, new, step)
        states.append(state)
    found = logprobs(model, jnp.stack(states, axis=2))  # [B, K, steps, V]
    for row, prompt in enumerate(prompts.tolist()):
        start = jnp.tile(model.tokens[row, :prompt], (samples, 1))
        alone = run_logits(model.params, model.config, jnp.concatenate([start, ends[row]], axis=1))
        wanted = jax.nn.log_softmax(alone[:, prompt:])
        np.testing.assert_allclose(found[row], wanted, atol=1e-4)


def test_blocks_of_queries_change_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = jnp.asarray([5, 3])
    ends = jnp.asarray([19, 14])

    def compute(block: int) -> tuple[str, np.ndarray, np.ndarray]:
        monkeypatch.setattr(attention, "QUERY_BLOCK", block)

        def both(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden, _ = forward(model.params, model.config, tokens, length=model.lengths)
            _, past = forward(model.params, model.config, tokens[:, :5], length=prompts)
            rest, _ = forward(
                model.params, model.config, tokens[:, 5:], length=ends, start=prompts, past=(past,)
            )
            return hidden, rest

        first, second = jax.jit(both, compiler_options=QUICK)(model.tokens)
        program = str(jax.make_jaxpr(both)(model.tokens))
        return program, logprobs(model, first), logprobs(model, second)

    plain, *wanted = compute(TIME)
    blocks, *found = compute(8)
    assert plain.count("dot_general") < blocks.count("dot_general"), "no blocks were made"
    for one, other in zip(found, wanted, strict=True):
        for row in range(2):
            length = min(LENGTHS[row], one.shape[1], int(ends[row]) if one is found[1] else TIME)
            np.testing.assert_allclose(one[row, :length], other[row, :length], atol=5e-5)


def test_padding_is_never_seen(model: Model) -> None:
    lengths = jnp.asarray([17, 9])
    beyond = jnp.arange(TIME) >= lengths[:, None]
    other = jnp.where(beyond, (model.tokens + 7) % VOCAB, model.tokens)
    assert not np.array_equal(model.tokens, other)
    last = jnp.asarray([[3], [4]])
    results = []
    for tokens in (model.tokens, other):
        hidden, segment = run_forward(model.params, model.config, tokens, length=lengths)
        after, _ = run_forward(
            model.params,
            model.config,
            last,
            length=jnp.ones(2, jnp.int32),
            start=lengths,
            past=(segment,),
        )
        own = empty_own(model.config, lengths, 1, 2)
        sample, _ = run_parallel(model.params, model.config, last, past=(segment,), own=own)
        assert np.isfinite(hidden).all()
        real = np.asarray(hidden)[~np.asarray(beyond)]
        results.append([real, np.asarray(after), np.asarray(sample)])
    for one, two in zip(*results, strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_row_does_not_depend_on_its_neighbours(model: Model) -> None:
    alone = run_logits(model.params, model.config, model.tokens[1:])
    together = run_logits(model.params, model.config, model.tokens)
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


# --- other forms of the same model ---


def test_bfloat16_stays_near_float32(model: Model) -> None:
    config = dataclasses.replace(model.config, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)
    found = run_logits(params, config, model.tokens)
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()
    wanted = run_logits(model.params, model.config, model.tokens)
    error = np.abs(np.asarray(found - wanted))
    assert error.max() > 1e-5, "nothing was computed in bfloat16"
    assert error.mean() < 0.05 * np.asarray(wanted).std()


@pytest.mark.parametrize("name", CONFIGS)
def test_cpu_decoder_is_the_same_model(name: str) -> None:
    model = build(name)
    config, params = cpu_decoder(model.config, model.params)
    found = run_logits(params, config, model.tokens)
    np.testing.assert_allclose(
        found, run_logits(model.params, model.config, model.tokens), atol=1e-4, rtol=1e-4
    )
    _, segment = run_forward(params, config, model.tokens, length=model.lengths)
    assert len(segment.keys) == len(segment.values) == config.num_layers
    _, stacked = run_forward(model.params, model.config, model.tokens, length=model.lengths)
    for layer in range(config.num_layers):
        wanted = layer_of(tuple(zip(stacked.keys, stacked.values, strict=True)), config, layer)
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4),
            (segment.keys[layer], segment.values[layer]),
            wanted,
        )
    # Its own cache form continues it as well.
    own = empty_own(config, model.lengths, 1, 2)
    last = jnp.asarray([[3], [4]])
    sample, _ = run_parallel(params, config, last, past=(segment,), own=own)
    after, _ = run_forward(
        model.params,
        model.config,
        last,
        length=jnp.ones(2, jnp.int32),
        start=model.lengths,
        past=(stacked,),
    )
    np.testing.assert_allclose(sample, after, atol=1e-4)


# --- over devices ---


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("constrained", [False, True])
def test_sharded_logits_are_those_of_one_device(name: str, constrained: bool) -> None:
    assert jax.device_count() == 8
    model = build(name)
    config = model.config
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(
        model.params, tree_shardings(param_axes(config), mesh, abstract_params(config))
    )
    kernel = placed["layers"]["mlp"]["gate_up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 2, 24, 16)
    tokens = jnp.concatenate([model.tokens, model.tokens[::-1] + 1]) % VOCAB
    wanted = run_logits(model.params, config, tokens)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    sharded = jax.jit(lambda params, tokens: logits(params, config, tokens), compiler_options=QUICK)
    if constrained:
        with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(RULES.items())):
            found = sharded(placed, jax.device_put(tokens, rows))
        assert found.sharding.shard_shape(found.shape) == (1, TIME, VOCAB // 2)
    else:
        found = sharded(placed, jax.device_put(tokens, rows))
    assert len(found.sharding.device_set) == 8
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)


def test_one_key_head_is_kept_whole_where_tensor_does_not_divide_it() -> None:
    config = family_config("llama", **(SIZES | {"num_kv_heads": 1}))
    params = random_params(config)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(
        params, tree_shardings(param_axes(config), mesh, abstract_params(config))
    )
    kernel = placed["layers"]["attention"]["kv"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 2, 1, 8, 8)
    tokens = jnp.tile(build("tied").tokens, (2, 1))
    found = jax.jit(lambda params, tokens: logits(params, config, tokens))(
        placed, jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("fsdp")))
    )
    np.testing.assert_allclose(found, run_logits(params, config, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_axis_of_every_parameter_has_a_name_with_a_rule(name: str) -> None:
    config = CONFIGS[name]
    shapes = abstract_params(config)
    axes = param_axes(config)

    def check(shape: jax.ShapeDtypeStruct, names: tuple[str | None, ...]) -> None:
        assert type(names) is tuple
        assert len(names) == len(shape.shape)
        # Only the pair that makes a fused kernel has no name.
        assert all(name in RULES or size == 2 for name, size in zip(names, shape.shape))  # noqa: B905
        assert names.count(None) <= 1

    jax.tree.map(check, shapes, axes)  # fails unless the trees match
    layer_axes = jax.tree.leaves(axes["layers"], is_leaf=lambda node: type(node) is tuple)
    assert all(names[0] == "layers" for names in layer_axes)


@pytest.mark.slow
def test_initial_parameters_keep_the_size_of_activations() -> None:
    config = CONFIGS["gemma3"]
    params = init_params(config, jax.random.key(0))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config)
    )
    for scale in (params["final_norm"]["scale"], params["layers"]["attention"]["q_norm"]["scale"]):
        np.testing.assert_array_equal(scale + config.norm_offset, 1.0)
    fan_in = {"gate_up": WIDTH, "down": config.mlp_dim}
    for name, size in fan_in.items():
        kernel = np.asarray(params["layers"]["mlp"][name]["kernel"])
        assert kernel.std() == pytest.approx(size**-0.5, rel=0.1)
        assert not np.array_equal(kernel[0], kernel[1]), "layers must differ"


# --- configurations ---


def test_heads_must_be_shared_evenly() -> None:
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        family_config("llama", **(SIZES | {"num_kv_heads": 3}))


def test_every_layer_needs_a_window() -> None:
    with pytest.raises(ValueError, match="windows has 4 entries for num_layers=5"):
        dataclasses.replace(CONFIGS["llama"], num_layers=5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, "float32", np.dtype("float32")])
def test_types_that_are_computed_in(dtype: Any) -> None:
    assert dtype_name(dtype) == jnp.dtype(dtype).name


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int32, np.float64])
def test_types_that_are_not(dtype: Any) -> None:
    with pytest.raises(UsageError, match="choose float32 or bfloat16"):
        dtype_name(dtype)


def test_families_differ_in_these_values() -> None:
    llama, gemma = CONFIGS["llama"], CONFIGS["gemma3"]
    assert llama.head_dim == WIDTH // 4
    assert llama.query_scale == llama.head_dim**-0.5
    assert llama.group == 2
    assert gemma.windows == (8, GLOBAL_WINDOW, 8, GLOBAL_WINDOW)
    assert gemma.scale_embedding and not llama.scale_embedding
    assert llama != gemma
    assert hash(llama) == hash(CONFIGS["llama"])
