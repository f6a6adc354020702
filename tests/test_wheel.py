# SPDX-License-Identifier: MIT
"""A wheel in clean environments: ``make test-wheel`` builds one and names it in ``FFM_EXT_WHEEL``.

An environment here sees nothing but its own packages. Those with an extra borrow torch and the wheel from ``base`` by a
``.pth`` file, so that each installs what the extra itself asks for, and no second torch. How the quick tests run on a
wheel, pyproject.toml says for cibuildwheel.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest
from checkout import needs_checkout
from packaging.metadata import Metadata
from packaging.requirements import Requirement

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

ROOT = needs_checkout()
WHEEL = Path(os.environ.get("FFM_EXT_WHEEL", "")).absolute()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WHEEL.is_file(), reason="FFM_EXT_WHEEL names no wheel: make test-wheel"),
]

CIBUILDWHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
OLDEST_TORCH = shlex.split(CIBUILDWHEEL["before-test"])[-1]
# The torch that most users of pip get: a later release, built for CUDA.
OTHER_TORCH = os.environ.get("FFM_EXT_OTHER_TORCH", "torch==2.14.1")

# Extra -> what it is for, as code that fails without it.
EXTRAS = {
    "cli": "import rich.progress; from ffm_ext.cli import main; main(['info'])",
    "sklearn": "from ffm_ext.sklearn import FFMClassifier; FFMClassifier()",
    "plot": "import matplotlib; matplotlib.use('agg'); from ffm_ext import FFM, inspection; "
    "inspection.plot_field_strength(FFM(2, field_dims=[3, 4]))",
    "bench": "import matplotlib, pytest_benchmark",
    "docs": "import furo, ipykernel, linkcheck, myst_nb, nbclient, sphinx, sphinx_copybutton",
    "distributed": "import torch, ffm_ext.distributed; from torchrec import KeyedJaggedTensor as Jagged\n"
    "model = ffm_ext.distributed.EmbeddingFFM({'user': 3, 'film': 4}, 8)\n"
    "batch = Jagged(['user', 'film'], torch.tensor([2, 0, 3, 1]), lengths=torch.tensor([1, 1, 1, 1]))\n"
    "model(batch).sum().backward(); assert model(batch).shape == (2,)",
    "dev": "import build, cmake, hypothesis, mypy, ninja, pandas, polars, pyarrow, pybind11, pytest, xdist",
    "all": "import furo, hypothesis, matplotlib, rich, sklearn, ffm_ext.sklearn",
}
if sys.version_info < (3, 11):
    EXTRAS["docs"] = "import ipykernel, linkcheck, nbclient"
    EXTRAS["all"] = EXTRAS["all"].replace("furo, ", "")

TRAIN = """
import torch, ffm_ext
from ffm_ext.optim import AdaGrad
from ffm_ext.training import Trainer

x, y = torch.randint(10, (256, 3)), torch.randint(2, (256,)).float()
model = ffm_ext.FFM(4, field_dims=[10, 10, 10])
before = torch.nn.functional.binary_cross_entropy_with_logits(model(x), y)
optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
for step in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), y)
    loss.backward()
    optimizer.step()
assert loss < before
Trainer(model, optimizer=AdaGrad(lr=0.1)).fit((x, y), epochs=2)
print(ffm_ext.build_info()["torch_built_against"], torch.__version__)
"""


class Environment:
    """A virtual environment with nothing in it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=True, symlinks=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def run(self, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> str:
        # Only what pip needs to find packages is taken along.
        kept = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("PIP_", "SSL_")) or name in ("HOME", "TMPDIR")
        }
        done = subprocess.run(
            [self.python, *arguments],
            cwd=cwd or self.folder,
            env={**kept, "PATH": f"{self.folder}/bin:/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def remove(self) -> None:
        """At once: pytest keeps what the last runs left, and these are gigabytes."""
        shutil.rmtree(self.folder)

    def install(self, *packages: str | Path) -> None:
        self.run("-m", "pip", "install", "--quiet", "--no-compile", *packages)


def pinned(name: str, file: str = "dev.txt") -> str:
    """A package as a file of requirements pins it."""
    for line in (ROOT / "requirements" / file).read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.name == name and (not requirement.marker or requirement.marker.evaluate()):
            return f"{name}{requirement.specifier}"
    raise LookupError(name)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    environment = Environment(tmp_path_factory.mktemp("base"))
    environment.install(pinned("torch"), WHEEL)
    yield environment
    environment.remove()


def metadata() -> Metadata:
    with ZipFile(WHEEL) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
        return Metadata.from_email(wheel.read(name), validate=True)


def test_metadata_is_valid() -> None:
    found = metadata()
    assert found.name == "ffm-ext"
    assert str(found.license_expression) == "MIT AND CC-BY-4.0"
    assert {Path(path).name for path in found.license_files} == {"LICENSE", "DATA_LICENSE.txt"}
    with ZipFile(WHEEL) as wheel:
        (tags,) = [n for n in wheel.namelist() if n.endswith(".dist-info/WHEEL")]
        assert message_from_bytes(wheel.read(tags))["Root-Is-Purelib"] == "false"
        names = wheel.namelist()
    libraries = {name for name in names if ".so" in name}  # no copy of torch's own
    assert libraries == {
        "ffm_ext/libffm_ext_ops.so",
        f"ffm_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}",
    }
    assert not [name for name in names if name.split("/")[0] in ("tests", "benchmarks", "csrc")]


def test_requirements_hold(base: Environment) -> None:
    base.run("-m", "pip", "check")


def test_trains_where_no_compiler_is(base: Environment, tmp_path: Path) -> None:
    # A PATH that has nothing but this Python.
    (tmp_path / "python").symlink_to(base.python)
    assert not any(shutil.which(name, path=str(tmp_path)) for name in ("cc", "c++", "g++", "ninja"))
    base.run("-c", TRAIN, PATH=str(tmp_path))


def test_every_extra_is_tested() -> None:
    assert set(metadata().provides_extra) == set(EXTRAS)


@pytest.mark.parametrize("extra", EXTRAS)
def test_extra(extra: str, base: Environment, tmp_path: Path) -> None:
    environment = Environment(tmp_path / extra)
    (environment.site / "base.pth").write_text(f"{base.site}\n")
    environment.install(f"ffm-ext[{extra}] @ {WHEEL.as_uri()}")
    environment.run("-m", "pip", "check")
    if extra == "distributed":  # the other half of it, which would bring what that half is for
        environment.install("--no-deps", pinned("torchrec", "distributed.txt"))
    environment.run("-c", EXTRAS[extra])
    environment.remove()


def run_quick_tests(environment: Environment, torch: str, folder: Path) -> None:
    """What cibuildwheel does with a wheel, in its order: pyproject.toml says all of it but the torch."""
    environment.install(torch)
    extras = ",".join(CIBUILDWHEEL["test-extras"])
    environment.install(f"ffm-ext[{extras}] @ {WHEEL.as_uri()}")
    environment.install(*CIBUILDWHEEL["test-requires"])
    built, runs = environment.run("-c", TRAIN).split()
    assert Requirement(torch).specifier.contains(runs)
    assert built.split("+")[0] != runs.split("+")[0]
    environment.run("-m", "pip", "check")
    # Away from the sources: what the tests import is the wheel.
    folder.mkdir()
    for name in CIBUILDWHEEL["test-sources"]:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    python, *command = shlex.split(CIBUILDWHEEL["test-command"])
    assert python == "python"
    print(environment.run(*command, cwd=folder))


def test_runs_on_the_oldest_torch(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "oldest")
    run_quick_tests(environment, OLDEST_TORCH, tmp_path / "sources")
    environment.remove()


def test_runs_on_another_torch(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "other")
    run_quick_tests(environment, OTHER_TORCH, tmp_path / "sources")
    environment.run("-c", "import torch; assert torch.version.cuda")
    environment.remove()
