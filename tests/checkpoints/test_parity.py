"""The real checkpoints against `transformers` reading the same GGUF file."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from grm_jax import checkpoints
from grm_jax.models import DecoderConfig, Params, Segment, forward, forward_parallel, unembed
from grm_jax.prompts import tokenizer_from_gguf
from tests.models.caches import appended, empty_own

LOGPROB_LIMIT = 2e-3
"""Both sum thousands of float32 products a layer, in orders of their own."""

CACHED = 12
"""Tokens at the end of each prompt that are decoded one by one."""

PROSE = """The lighthouse keeper counted the boats twice before he lit the lamp. There had been nine
in the morning, and now there were eight; the missing one was the green dinghy that belonged to the
schoolteacher, who went out after mackerel whenever her pupils had an examination to write."""

CODE = '''def longest_run(values: list[int]) -> tuple[int, int]:
    """Returns the first and last index of the longest rising run."""
    best = (0, 0)
    begin = 0
    for index in range(1, len(values)):
        if values[index] <= values[index - 1]:
            begin = index
        if index - begin > best[1] - best[0]:
            best = (begin, index)
    return best


assert longest_run([3, 1, 4, 5, 9, 2, 6]) == (1, 4)
for row in sorted({"a": 1.5, "b": -2e-7}.items(), key=lambda item: -item[1]):
    print(f"{row[0]:>8}\\t{row[1]!r}", end="\\r\\n")
'''

MATHS = r"""Claim. For every $n \ge 1$ the sum of the first $n$ odd numbers is $n^2$.

Proof. For $n = 1$ the sum is $1 = 1^2$. Suppose that $1 + 3 + \dots + (2n - 1) = n^2$. Adding the
next odd number, $2n + 1$, to both sides gives $n^2 + 2n + 1 = (n + 1)^2$, which is the claim for
$n + 1$. By induction it holds for all $n$.

Here is a table of the first few cases:
n=1: 1 = 1; n=2: 1 + 3 = 4; n=3: 1 + 3 + 5 = 9; n=4: 16; n=5: 25; n=6: 36; n=12: 144.

A second way to see it: draw an $n \times n$ square of dots and cut it into L-shaped strips, the
first with one dot in the corner, the next with three, then five, and so on. \boxed{n^2}

Exercise. Show that $\sum_{k=1}^{n} k^3 = \left(\frac{n(n+1)}{2}\right)^2$, so that the cubes of
1, 2 and 3 sum to 36. Hint: compare the difference of the right sides for n and n - 1 with $n^3$.

"""


class Prompt(NamedTuple):
    text: str
    least: int
    most: int


PROMPTS = {
    "prose": Prompt(PROSE, 40, 75),
    "code": Prompt(CODE, 170, 300),
    "mixed": Prompt(MATHS + PROSE + "\n\n\u00c0 bient\u00f4t! \u4f60\u597d \U0001f642\n", 400, 620),
}


class Model(NamedTuple):
    config: DecoderConfig
    params: Params
    reference: torch.nn.Module
    prompts: dict[str, list[int]]


def load(path: Path) -> Model:
    file = checkpoints.open_checkpoint(str(path))
    tokenizer = tokenizer_from_gguf(file.metadata or {})
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    prompts = {name: start + tokenizer.encode(prompt.text) for name, prompt in PROMPTS.items()}
    config, params = checkpoints.load(file)
    torch.set_num_threads(2)
    reference = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return Model(config, params, reference.eval(), prompts)


@pytest.fixture(
    scope="module",
    params=["smollm2_gguf", pytest.param("gemma3_gguf", marks=pytest.mark.slow)],
)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    yield load(request.getfixturevalue(request.param))


def hidden_states(model: Model, tokens: list[int], **more: jax.Array) -> tuple[jax.Array, Segment]:
    length = jnp.asarray([len(tokens)], jnp.int32)
    run = jax.jit(forward, static_argnums=1)
    return run(model.params, model.config, jnp.asarray([tokens]), length=length, **more)


def logprobs(model: Model, hidden: jax.Array) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(unembed(model.params, model.config, hidden)))


@pytest.mark.parametrize("name", PROMPTS)
def test_log_probabilities_are_those_of_the_reference(
    model: Model, name: str, record_property
) -> None:
    tokens = model.prompts[name]
    assert PROMPTS[name].least <= len(tokens) <= PROMPTS[name].most
    with torch.no_grad():
        output = model.reference(torch.tensor([tokens])).logits[0]
        wanted = torch.log_softmax(output, dim=-1).numpy()
    found = logprobs(model, hidden_states(model, tokens)[0][0])
    assert found.shape == wanted.shape
    difference = float(np.abs(found - wanted).max())
    record_property("largest difference", difference)
    print(f"{model.config.family} {name}: {len(tokens)} tokens, difference {difference:.2e}")
    assert difference <= LOGPROB_LIMIT
    np.testing.assert_array_equal(found.argmax(axis=-1), wanted.argmax(axis=-1))


@pytest.mark.parametrize(
    "name",
    ["prose", *(pytest.param(name, marks=pytest.mark.slow) for name in PROMPTS if name != "prose")],
)
def test_decoding_with_a_cache_equals_one_pass(model: Model, name: str) -> None:
    tokens = model.prompts[name]
    cut = len(tokens) - CACHED
    whole, _ = hidden_states(model, tokens)
    wanted = logprobs(model, whole[0, cut:])

    _, prefix = hidden_states(model, tokens[:cut])
    piece, _ = hidden_states(
        model, tokens[cut:], start=jnp.asarray([cut], jnp.int32), past=(prefix,)
    )
    np.testing.assert_allclose(logprobs(model, piece[0]), wanted, atol=1e-4)

    step = jax.jit(forward_parallel, static_argnums=1)
    own = empty_own(model.config, jnp.asarray([cut], jnp.int32), 1, CACHED)
    states = []
    for index, token in enumerate(tokens[cut:]):
        here = jnp.asarray([[token]])
        state, new = step(model.params, model.config, here, past=(prefix,), own=own)
        own = appended(own, new, index)
        states.append(state[0, 0])
    np.testing.assert_allclose(logprobs(model, jnp.stack(states)), wanted, atol=1e-4)
