"""Fixtures for all tests, and a machine of eight simulated devices to run them on."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from grm_jax import GRM
    from grm_jax.prompts import Tokenizer

# JAX reads these when it is first imported, which the test modules do after this file.
FLAGS = ["--xla_force_host_platform_device_count=8"]
if version("jaxlib").startswith("0.10."):  # One that XLA does not know ends the process.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([GIVEN, *(x for x in FLAGS if x.split("=")[0] not in GIVEN)])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Machine code is made in haste, as compiling takes far longer here than what is computed: it is not
# the code that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the files that take longest, so that no process is left alone with one."""
    longest = ("test_notebooks.py", "test_docs.py")
    items.sort(key=lambda item: item.path.name not in longest)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The SmolLM2-135M file, downloaded into the user's cache on first use."""
    from grm_jax.checkpoints.sources import fetch

    return fetch("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """The Gemma-3-270M file, downloaded into the user's cache on first use."""
    from grm_jax.checkpoints.sources import fetch

    return fetch("gemma3-270m")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Benchmark files that lie beside the repository and, for their licences, not in it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer() -> "Tokenizer":
    """A token for every byte, and two control tokens; the last one ends a turn."""
    from grm_jax.prompts import Tokenizer

    letters = tuple(bytes([byte]) for byte in range(256))
    return Tokenizer(
        token_bytes=(*letters, b"<|im_start|>", b"<|im_end|>"),
        control_ids=frozenset({256, 257}),
        bos_id=None,
        eos_ids=(257,),
        add_bos=False,
        chat_template=None,
        text_encoder=lambda text: list(text.encode()),
    )


@pytest.fixture(scope="session")
def tiny_grm(byte_tokenizer: "Tokenizer") -> "GRM":
    """A judge with random weights that reads and writes bytes."""
    import jax
    import numpy as np

    from grm_jax import GRM, grammar
    from grm_jax.models import abstract_params, family_config

    config = family_config(
        "llama",
        vocab_size=byte_tokenizer.vocab_size,
        num_layers=2,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=64,
        max_context=4096,
        tie_embeddings=True,
    )
    # NumPy's numbers, because compiling `init_params` would take longer than most tests.
    rng = np.random.default_rng(7)

    def fill(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jax.device_put(np.ones(leaf.shape, leaf.dtype))
        # Embeddings so large that some tokens are clearly likelier than others.
        size = 0.3 if "embedding" in name else config.width**-0.5
        return jax.device_put((size * rng.normal(size=leaf.shape)).astype(leaf.dtype))

    params = jax.tree_util.tree_map_with_path(fill, abstract_params(config))
    return GRM(
        name="tiny",
        config=config,
        params=params,
        tokenizer=byte_tokenizer,
        table=jax.device_put(grammar.token_table(byte_tokenizer.token_bytes)),
    )
