"""Generative reward models in JAX: judge, train, and scale at inference time.

A generative reward model reads a conversation and candidate responses and writes principles, a
critique and an integer score for each response. Judgements sampled k times and voted are better
than one; SPCT trains the model that writes them (DeepSeek-GRM, arXiv:2504.02495).

    from grm_jax import GRM
    grm = GRM.from_pretrained("smollm2-135m")
    judgement = grm.judge(messages, responses, samples=8, constrain=True)

Letters for shapes, everywhere in this package:

- `B` comparisons (or prompts), `N` responses in one, `K` samples, `G` samples in a group;
- `P` prompt tokens, `T` generated tokens, `S` tokens of a cached segment;
- `L` layers, `D` width, `H` heads, `V` vocabulary, `W` symbols of a token.
"""

from grm_jax.data import Judgement, Sample
from grm_jax.errors import UsageError
from grm_jax.judge import GRM
from grm_jax.version import __version__

__all__ = ["GRM", "Judgement", "Sample", "UsageError", "__version__"]
