# SPDX-License-Identifier: MIT
"""The documentation site: ``make docs`` builds it into build/docs. Pages load nothing from other hosts."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from mdit_py_plugins.anchors.index import slugify
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

sys.path.insert(0, str(Path(__file__).parents[1]))

logger = getLogger(__name__)

project = "ffm_ext"
author = "the ffm_ext developers"
project_copyright = author
version = release = installed_version("ffm-ext")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# ---- Markdown, and the example notebook with the outputs that it is kept with
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_execution_show_tb = True

# ---- API reference
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {
    "members": True,
    # For repr; and scikit-learn's own, for metadata routing.
    "exclude-members": "extra_repr, set_fit_request, set_partial_fit_request, set_score_request",
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
# Reported are public names of ours that do not exist; those of other projects would need their sites at build time.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!ffm_ext\b).*"), ("py:.*", r"ffm_ext\..*\b_.*")]

# ---- HTML
html_theme = "furo"
html_title = f"ffm_ext {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1d5c99", "color-brand-content": "#1d5c99"},
    "dark_css_variables": {"color-brand-primary": "#7db7ee", "color-brand-content": "#7db7ee"},
}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
copybutton_exclude = ".linenos, .gp, .go"

# Links out of docs/, as a reader of the repository follows them, and the page that has the same here. Files that are no
# page of their own are offered for download.
PAGES = {
    "../README.md": "index.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "../benchmarks/results/amd-epyc-avx512-2-cores/": "gallery.md",
    "../ffm_ext/reference.py": "reference/reference.md",
}


def link_pages(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace links of a page by those of ``PAGES``, and a notebook's anchors by those that Markdown has."""
    if app.env.doc2path(docname).suffix == ".ipynb":
        source[0] = re.sub(r"(?<=\]\(#)[^)]+", lambda link: slugify(link[0]), source[0])
        return
    source[0] = re.sub(r"(?<=\]\()\.\./[^)#]*", lambda link: PAGES.get(link[0], link[0]), source[0])


def mathml(node: nodes.math | nodes.math_block) -> str:
    """A formula as MathML, which browsers set by themselves, without a script."""
    try:
        text = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
        # As in TeX, these grow only where \\left and \\right say so.
        return re.sub("<mo>(?=[⟨⟩|])", '<mo stretchy="false">', text)
    except MathError as error:
        logger.warning("%s in %s", error, node.astext(), location=node)
        return ""


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line."""
    self.body.append(mathml(node))
    raise nodes.SkipNode


def visit_displaymath(self: HTML5Translator, node: nodes.math_block) -> None:
    """A formula on a line of its own."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node.get("number"):
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})</span>')
    self.body.append(mathml(node) + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """What this site adds to Sphinx."""
    app.connect("source-read", link_pages)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
