"""The model that a run trains: which parameters learn, where they live, and what is left of them.

All parameters learn, as float32, or adapters do beside a base model in the compute type, of which
neither gradients nor optimiser state exist.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike, DTypeLike

from grm_jax import checkpoints
from grm_jax.data.pipeline import Resumable
from grm_jax.distributed import tree_shardings, with_shardings
from grm_jax.errors import UsageError
from grm_jax.models import (
    DecoderConfig,
    DtypeName,
    Lora,
    Params,
    Rope,
    abstract_params,
    add_lora,
    dtype_name,
    family_config,
    forward,
    forward_branches,
    init_params,
    merge_lora,
    param_axes,
    split_lora,
)
from grm_jax.prompts import Tokenizer, save_tokenizer, tokenizer_from_folder, tokenizer_from_gguf
from grm_jax.prompts.nano import nano_tokenizer
from grm_jax.training.config import Settings
from grm_jax.training.learner import Learner
from grm_jax.training.logprobs import token_logprobs
from grm_jax.training.loop import Advanced, Run, train
from grm_jax.training.state import TrainState, shardings_of

NANO = "nano"
"""The tokenizer of the small comparisons, by this name in `model.tokenizer`."""

HEAD = "score"
"""A classifier's output matrix among the parameters."""


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model to be trained, whose parameters are not loaded yet.

    Attributes:
      name: What it was called in the configuration.
      config: The decoder's, with adapters if these are what learns.
      tokenizer: Its tokenizer.
      params: Shapes and shardings of what learns.
      frozen: Those of the base model under adapters; empty without.
      load_params: Loads what learns, as it is before the first step.
      load_frozen: Loads the rest.
    """

    name: str
    config: DecoderConfig
    tokenizer: Tokenizer
    params: Params
    frozen: Params
    load_params: Callable[[], Params]
    load_frozen: Callable[[], Params]


def open_model(settings: Settings, mesh: Mesh, *, num_labels: int = 0) -> Model:
    """Opens what `model.*` describes; `seed` decides what is random about it.

    Args:
      settings: The run's.
      mesh: Where its parameters will live.
      num_labels: Outputs of a classifier's head, which learns whatever else does; 0 for a language
        model. A language model's checkpoint becomes a classifier by a head of zeros.

    Raises:
      UsageError: There is no such model, or a setting does not fit it.
    """
    name = str(settings["model.name"])
    shape = settings.group_or_empty("model.shape")
    random = bool(settings["model.random"]) or bool(shape)
    opened = None if shape else checkpoints.open_checkpoint(name)
    tokenizer = _open_tokenizer(str(settings["model.tokenizer"]), opened)
    dtype = _compute_type(settings)
    stored = decoder_of_shape(shape, tokenizer) if opened is None else opened.config
    if stored.num_labels not in (0, num_labels):
        raise UsageError(
            f"{name} is a classifier of {stored.num_labels} outputs; this stage cannot begin there"
        )
    placed = place_model(settings, mesh, stored, dtype=dtype, num_labels=num_labels)
    key = jax.random.key(settings.at_least("seed", 0))
    adapter = str(settings["model.adapter"])
    lora = placed.config.lora
    if (lora or adapter) and (random or opened is None):
        raise UsageError("random parameters have nothing to adapt; set model.lora_rank to 0")
    if adapter and lora is None:
        raise UsageError("model.adapter is to be trained further; set model.lora_rank to its rank")
    base = _Base(
        opened=None if random else opened,
        config=dataclasses.replace(placed.config, lora=None),
        key=key,
        mesh=mesh,
    )
    if lora is None:
        load_params = functools.partial(base.load, jnp.float32, shardings_of(placed.params))
        load_frozen: Callable[[], Params] = dict
    else:
        load_params = functools.partial(_load_adapters, base, placed, adapter)
        load_frozen = functools.partial(_load_frozen, base, placed)
    return Model(
        name=name,
        config=placed.config,
        tokenizer=tokenizer,
        params=placed.params,
        frozen=placed.frozen,
        load_params=load_params,
        load_frozen=load_frozen,
    )


class Placed(NamedTuple):
    """What there is of a model on a mesh; see `Model` for each."""

    config: DecoderConfig
    params: Params
    frozen: Params


def place_model(
    settings: Settings,
    mesh: Mesh,
    stored: DecoderConfig,
    *,
    dtype: DtypeName,
    num_labels: int = 0,
) -> Placed:
    """Which parameters learn, which do not, and where they live; makes none of them.

    Args:
      settings: The run's.
      mesh: Where the parameters will live.
      stored: The decoder as its checkpoint has it.
      dtype: What it computes in.
      num_labels: As in `open_model`.

    Raises:
      UsageError: The adapters do not fit the decoder, or it has some already.
    """
    if stored.lora is not None:
        raise UsageError(
            f"{settings['model.name']} has adapters; merge them with `grm-jax convert`, or name "
            "their base in model.name and their folder in model.adapter"
        )
    remat, lora = bool(settings["model.remat"]), _lora(settings)
    plain = dataclasses.replace(stored, dtype=dtype, remat=remat, num_labels=num_labels)
    if lora is None:
        return Placed(plain, placed(plain, abstract_params(plain), mesh), {})
    key = jax.eval_shape(lambda: jax.random.key(0))
    # Only to have what does not fit said in one place.
    jax.eval_shape(lambda key: add_lora(plain, abstract_params(plain), lora, key)[1], key)
    adapted = dataclasses.replace(plain, lora=lora)
    params, _ = split_lora(placed(adapted, abstract_params(adapted), mesh))
    frozen = dict(placed(plain, abstract_params(plain, dtype), mesh))
    if num_labels:
        head = frozen.pop(HEAD)
        learnt = jax.ShapeDtypeStruct(head.shape, jnp.float32, sharding=head.sharding)
        params = {**params, HEAD: learnt}
    return Placed(adapted, params, frozen)


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Base:
    """A model without adapters.

    Attributes:
      opened: Where its parameters are stored; None to draw them.
      config: The decoder's; it may be a classifier where what is stored is not.
      key: Of what is drawn.
      mesh: Where the parameters will live.
    """

    opened: checkpoints.Checkpoint | None
    config: DecoderConfig
    key: jax.Array
    mesh: Mesh

    @property
    def needs_head(self) -> bool:
        """Whether a classifier's head is not among what is stored."""
        return self.opened is not None and self.opened.config.num_labels != self.config.num_labels

    def new_head(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """A classifier's head that has learnt nothing."""
        shape = (self.config.num_labels, self.config.width)
        return jax.device_put(jnp.zeros(shape, jnp.float32), sharding)

    def load(self, dtype: DTypeLike, shardings: Params) -> Params:
        """The parameters, with a new head if none is stored."""
        if self.opened is None:
            make = functools.partial(init_params, self.config)
            return jax.jit(make, out_shardings=shardings)(self.key)
        if not self.needs_head:
            return self.opened.load(dtype, shardings)
        stored = self.opened.config
        body = placed(stored, abstract_params(stored), self.mesh)
        params = dict(self.opened.load(dtype, shardings_of(body)))
        # A classifier has no matrix to make logits with.
        params.pop("head", None)
        return {**params, HEAD: self.new_head(shardings[HEAD])}


def _load_adapters(base: _Base, placed: Placed, adapter: str) -> Params:
    """What learns beside a base model: adapters, and a classifier's head.

    Args:
      base: The base model.
      placed: From `place_model`.
      adapter: A PEFT folder or the name of one; empty for new adapters.
    """
    adapted, (shardings, _) = placed.config, split_lora(shardings_of(placed.params))
    if adapter:
        found, adapters = checkpoints.load_adapter(adapter, base.config, {}, base.mesh)
        if found.lora != adapted.lora:
            raise UsageError(
                f"{adapter} has {found.lora}, but the configuration asks for {adapted.lora}"
            )
        if found.num_labels != adapted.num_labels:
            raise UsageError(
                f"{adapter} is a classifier of {found.num_labels} outputs; this stage cannot begin "
                "there"
            )
    else:
        # Of all parameters, the compiler makes those that are asked for.
        make = jax.jit(
            lambda key: split_lora(init_params(adapted, key))[0], out_shardings=shardings
        )
        adapters = make(base.key)
    if not adapted.num_labels or HEAD in adapters:
        return adapters
    if base.needs_head:
        head = base.new_head(placed.params[HEAD].sharding)
    else:
        head = _load_whole(base, placed)[HEAD].astype(jnp.float32)
    return {**adapters, HEAD: head}


def _load_frozen(base: _Base, placed: Placed) -> Params:
    """A base model without a classifier's head."""
    return {name: leaf for name, leaf in _load_whole(base, placed).items() if name != HEAD}


def _load_whole(base: _Base, placed: Placed) -> Params:
    whole = dict(placed.frozen)
    if base.config.num_labels:
        whole[HEAD] = placed.params[HEAD]
    return base.load(jnp.dtype(base.config.dtype), shardings_of(whole))


def train_model(
    model: Model,
    *,
    settings: Settings,
    workdir: Path,
    learner: Learner,
    batches: Resumable[Any],
    advance: Callable[[Any, Any], Advanced],
    updates: int = 1,
) -> TrainState | None:
    """Trains a model, and saves what becomes of it as `model` in the working directory.

    Args:
      model: The model.
      settings: As in `Run`, like the rest.
      workdir: Likewise.
      learner: Likewise.
      batches: Likewise.
      advance: Likewise.
      updates: Likewise.

    Returns:
      The state after the last step; None if the run was asked to stop before.

    Raises:
      UsageError: As `train`.
    """
    outcome = train(
        Run(
            settings=settings,
            workdir=workdir,
            learner=learner,
            load_params=model.load_params,
            load_frozen=model.load_frozen,
            batches=batches,
            advance=advance,
            updates=updates,
        )
    )
    if not outcome.finished:
        return None
    save_model(model, outcome.state, workdir / "model")
    return outcome.state


def save_model(model: Model, state: TrainState, folder: Path) -> None:
    """Writes what was trained so that it can be judged with, or trained on.

    A whole model becomes an Orbax checkpoint with its tokenizer; adapters become a PEFT folder,
    with a classifier's head if there is one. Those of experts have no place in such a folder and
    are merged. Every process of a group must call this.

    Args:
      model: The model.
      state: Its state after training.
      folder: Where to; what was there is replaced.
    """
    config, params = model.config, state.params
    if config.lora is not None:
        if "experts" not in config.lora.targets:
            checkpoints.save_adapter(folder, config, params, base=_lasting(model.name))
            return
        config, params = merge_lora(config, state.model)
    checkpoints.save_orbax(folder, dataclasses.replace(config, remat=False), params)
    if jax.process_index() == 0:
        save_tokenizer(model.tokenizer, folder)


def _lasting(name: str) -> str:
    """A model's name such that it can be found from other places too."""
    local = name not in checkpoints.MODELS and Path(name).exists()
    return str(Path(name).absolute()) if local else name


def next_token_logprobs(
    params: Params,
    config: DecoderConfig,
    tokens: jax.Array,
    *,
    lengths: jax.Array,
    mesh: Mesh,
    segment_ids: jax.Array | None = None,
    temperature: ArrayLike = 1.0,
    chunk: int = 4096,
    with_entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """What the model thinks of each row's own next tokens.

    Args:
      params: The whole model's parameters.
      config: The decoder's.
      tokens: `i32[B, S]`, left-aligned.
      lengths: `i32[B]`, real tokens of each row.
      mesh: Over whose `tensor` axis the vocabulary is split, if it can be.
      segment_ids: As in `grm_jax.models.forward`.
      temperature: That of the distribution.
      chunk: As in `token_logprobs`.
      with_entropy: Whether to return entropies as well.

    Returns:
      `f32[B, S]` twice: at t the log-probability of token t + 1, and the entropy there, without
      gradient, or None. The last column means nothing.
    """
    hidden, _ = forward(params, config, tokens, length=lengths, segment_ids=segment_ids)
    targets = jnp.roll(tokens, -1, axis=1)
    return _target_logprobs(
        params, config, mesh, hidden, targets, temperature, chunk, with_entropy=with_entropy
    )


def completion_logprobs(
    params: Params,
    config: DecoderConfig,
    prompts: jax.Array,
    completions: jax.Array,
    *,
    lengths: jax.Array,
    mesh: Mesh,
    temperature: ArrayLike = 1.0,
    chunk: int = 4096,
    with_entropy: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """What the model thinks of the tokens of G completions of each prompt, which is read once.

    Args:
      params: The whole model's parameters.
      config: The decoder's.
      prompts: `i32[B, P]`, left-aligned.
      completions: `i32[B, G, T]`, left-aligned; what fills them up may be any tokens.
      lengths: `i32[B]`, real tokens of each prompt, at least 1.
      mesh: As in `next_token_logprobs`, like the rest.
      temperature: Likewise.
      chunk: Likewise.
      with_entropy: Likewise.

    Returns:
      `f32[B, G, T]` twice: the log-probability of each token, and the entropy of its distribution,
      without gradient, or None.
    """
    # What predicts the first token is the last one of the prompt, so each text begins with it.
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)
    first = jnp.broadcast_to(last[:, None], (*completions.shape[:2], 1))
    texts = jnp.concatenate([first, completions[..., :-1]], axis=2)
    hidden = forward_branches(params, config, prompts, texts, length=lengths - 1)
    rows, shape = len(prompts), completions.shape
    logprobs, entropy = _target_logprobs(
        params,
        config,
        mesh,
        hidden.reshape(rows, -1, config.width),
        completions.reshape(rows, -1),
        temperature,
        chunk,
        with_entropy=with_entropy,
    )
    return logprobs.reshape(shape), None if entropy is None else entropy.reshape(shape)


def _target_logprobs(
    params: Params,
    config: DecoderConfig,
    mesh: Mesh,
    hidden: jax.Array,
    targets: jax.Array,
    temperature: ArrayLike,
    chunk: int,
    *,
    with_entropy: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """`token_logprobs` with a decoder's own settings, and entropies or None."""
    tensor = mesh.shape["tensor"]
    compute = functools.partial(
        token_logprobs,
        hidden,
        params["embedding" if config.tie_embeddings else "head"],
        targets,
        temperature=temperature,
        softcap=config.logit_softcap,
        chunk=chunk,
        vocab_shards=tensor if config.vocab_size % tensor == 0 else 1,
    )
    if with_entropy:
        logprobs, entropy = compute(with_entropy=True)
        return logprobs, entropy
    return compute(), None


def _open_tokenizer(own: str, opened: checkpoints.Checkpoint | None) -> Tokenizer:
    """The tokenizer of `model.tokenizer`, or of the checkpoint where that is empty."""
    if own == NANO:
        return nano_tokenizer()
    if own:
        return tokenizer_from_folder(Path(own))
    if opened is None:
        raise UsageError("model.shape has no tokenizer; name a folder in model.tokenizer")
    if opened.metadata is not None:
        return tokenizer_from_gguf(opened.metadata)
    return tokenizer_from_folder(opened.path, vocab_size=opened.config.vocab_size)


def _compute_type(settings: Settings) -> DtypeName:
    named = settings.choice("model.dtype", ("auto", "float32", "bfloat16"))
    if named == "auto":
        named = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dtype_name(named)


def decoder_of_shape(shape: Mapping[str, Any], tokenizer: Tokenizer) -> DecoderConfig:
    """The decoder that `model.shape` describes.

    Raises:
      UsageError: It describes none.
    """
    values = dict(shape)
    try:
        family = str(values.pop("family"))
        for name in ("rope", "rope_local"):
            if name in values:
                values[name] = Rope(**values[name])
        return family_config(family, vocab_size=tokenizer.vocab_size, **values)
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"model.shape does not describe a decoder: {reason}") from error


def _lora(settings: Settings) -> Lora | None:
    rank = settings.at_least("model.lora_rank", 0)
    alpha, targets = float(settings["model.lora_alpha"]), tuple(settings["model.lora_targets"])
    return Lora(rank=rank, alpha=alpha, targets=targets) if rank else None


def placed(config: DecoderConfig, shapes: Params, mesh: Mesh) -> Params:
    """Shapes of a decoder's parameters together with where they live on a mesh."""
    return dict(with_shardings(shapes, tree_shardings(param_axes(config), mesh, shapes)))
