"""The package itself: what it requires, what `import jaxmem` loads, and that the tables about it agree."""

import re
import runpy
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import jaxmem
from jaxmem import cli, doctor

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "tensorflow", "libtpu", "nvidia", "cuda")


@pytest.fixture(scope="module")
def setup_arguments():
    """What setup.py hands to setuptools.setup; setuptools itself is not needed."""
    captured = {}
    fake = types.ModuleType("setuptools")
    fake.setup = captured.update
    fake.find_packages = lambda include: []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", fake)
        runpy.run_path(str(ROOT / "setup.py"))
    return captured


def names(requirements):
    return [Requirement(r).name for r in requirements]


def closure(requirements, seen):
    """Names of everything that a base install pulls in, by the metadata of what is installed here."""
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if requirement.name.lower() not in seen:
            seen.add(requirement.name.lower())
            closure(metadata.requires(requirement.name) or [], seen)
    return seen


def test_base_install_is_backend_neutral(setup_arguments):
    everything = closure(setup_arguments["install_requires"], set())
    assert {"jax", "jaxlib", "flax", "scipy"} <= everything  # the walk went below the first level
    assert not [name for name in everything if any(heavy in name for heavy in HEAVY)]


def test_every_base_requirement_is_bounded_from_below(setup_arguments):
    for requirement in map(Requirement, setup_arguments["install_requires"]):
        assert not requirement.extras, requirement
        assert any(clause.operator == ">=" for clause in requirement.specifier), requirement


def test_installed_versions_are_in_range(setup_arguments):
    for requirement in map(Requirement, setup_arguments["install_requires"]):
        assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True), requirement


def test_python_range(setup_arguments):
    assert setup_arguments["python_requires"] == ">=3.11,<3.14"


def test_doctor_knows_every_requirement_and_extra(setup_arguments):
    assert list(doctor.PACKAGES) == names(setup_arguments["install_requires"])
    assert set(doctor.EXTRAS) == set(setup_arguments["extras_require"])


def test_readme_lists_every_extra_and_verb(setup_arguments):
    readme = (ROOT / "README.md").read_text()
    for extra in setup_arguments["extras_require"]:
        assert f"`{extra}`" in readme
    for verb in cli.VERBS:
        assert f"jaxmem {verb}" in readme


def test_version_is_one_fact(setup_arguments):
    assert setup_arguments["version"] == jaxmem.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", jaxmem.__version__)


@pytest.mark.parametrize("code", ["import jaxmem", "import jaxmem.cli", "import jaxmem.cli as c; c.main(['--help'])"])
def test_import_is_light(code):
    heavy = ("jax", "jaxlib", "flax", "optax", "orbax", "transformers", "torch", "tensorflow", "numpy.linalg")
    show = f"import sys; print('LOADED', [m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "LOADED []"


def test_public_names_are_lazy_and_complete():
    assert set(jaxmem.__all__) <= set(dir(jaxmem))
    with pytest.raises(AttributeError, match="jaxmem.*'lode'.*load"):
        _ = jaxmem.lode


def test_public_names_come_from_the_face():
    import jaxmem.api

    for name in ("Completion", "Model", "load"):
        assert getattr(jaxmem, name) is getattr(jaxmem.api, name)
