"""Configuration of the documentation."""

import shutil
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

from lightning_powersgd import __version__

# Sphinx reads only what is in its own folder.
HERE = Path(__file__).parent
not_pages = shutil.ignore_patterns("*.py", "__pycache__", ".ipynb_checkpoints")
shutil.copytree(HERE.parent / "examples" / "notebooks", HERE / "notebooks", ignore=not_pages, dirs_exist_ok=True)

project = "lightning-powersgd"
author = "The lightning-powersgd developers"
copyright = f"2026, {author}"  # noqa: A001
release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
nb_execution_mode = "off"  # notebooks are saved with their outputs, and the tests run them
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
# What builds leave behind (myst-nb puts copies of the notebooks into jupyter_execute), and parts of pages.
exclude_patterns = ["_build", "jupyter_execute", "benchmarks", "accuracy"]


def setup(app: Sphinx) -> None:
    """Write formulas as MathML, which browsers show by themselves: Sphinx's own ways need a network or LaTeX."""

    def write(display: str):
        def visit(self, node: nodes.math | nodes.math_block) -> None:
            self.body.append(convert(node.astext(), display=display))
            raise nodes.SkipNode

        return visit, None

    app.add_html_math_renderer("mathml", write("inline"), write("block"))
