"""Configuration of the documentation."""

from lightning_powersgd import __version__

project = "lightning-powersgd"
author = "The lightning-powersgd developers"
copyright = f"2026, {author}"  # noqa: A001
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
html_theme = "furo"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
exclude_patterns = ["_build", "benchmarks"]  # the latter are parts of pages
