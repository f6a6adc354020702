# SPDX-License-Identifier: MIT
"""The documentation site: it builds without a warning, names everything public, and loads nothing from elsewhere."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ffm_ext

ROOT = Path(__file__).parents[1]
# What a browser fetches by itself when it shows a page. Links and licences are not among it.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']([^"']+)"""
    r"""|<link\b[^>]*\brel=["'](?:stylesheet|preload|preconnect|icon|shortcut icon)["'][^>]*\bhref=["']([^"']+)"""
)


def public_modules() -> list[ModuleType]:
    names = [info.name for info in pkgutil.iter_modules(ffm_ext.__path__)]
    names.remove("libffm_ext_ops")  # the operators: a library, but no module
    modules = [importlib.import_module(f"ffm_ext.{name}") for name in names if name[0] != "_"]
    return [ffm_ext, *modules]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="the site is built with Python 3.11 or newer")
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--keep-going",
        "-q",
        "docs",
        out,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_every_public_name_is_on_a_page(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    with open(site / "objects.inv", "rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, uri: uri)
    documented = {
        name for kind, names in inventory.items() if kind.startswith("py:") for name in names
    }
    missing = []
    for module in public_modules():
        for name in getattr(module, "__all__", ()):
            # A module's page may leave to the package's page what the package offers.
            same = getattr(ffm_ext, name, None) is getattr(module, name)
            homes = [module.__name__, *(["ffm_ext"] if same else [])]
            if not documented & {f"{home}.{name}" for home in homes}:
                missing.append(f"{module.__name__}.{name}")
    assert len(documented) > 100
    assert not missing


@pytest.mark.slow
def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    loaded = [a or b for page in pages for a, b in LOADED.findall(page.read_text())]
    for sheet in site.rglob("*.css"):
        loaded += re.findall(r"""(?:url\(|@import\s+)["']?([^"')\s]+)""", sheet.read_text())
    assert len(loaded) > len(pages)
    assert not [target for target in loaded if re.match(r"(https?:)?//", target)]


@pytest.mark.slow
def test_formulas_need_no_script(site: Path) -> None:
    page = (site / "maths.html").read_text()
    assert page.count("<math") > 50
    assert not re.search(r"<script[^>]*(mathjax|katex)", page, re.IGNORECASE)
    assert "\\frac" not in page
