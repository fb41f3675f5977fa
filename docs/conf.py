"""The documentation site: `make docs` builds it into out/docs.

The build trains nothing and needs no network. What would go stale is generated while it runs: tables of hyperparameters,
presets and results (_ext/algorithm_tables.py) and the API reference (autodoc). Links to other projects come from the short
lists in _inventories, because a complete inventory would have to be fetched at each build.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

import stored_inventories  # noqa: E402  (lies in _ext)

import diffagents  # noqa: E402

project = "diffagents"
author = "diffagents contributors"
copyright = "diffagents contributors, MIT licence"
version = release = diffagents.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.intersphinx",
    "sphinx_design",
    "algorithm_tables",
    "command_line",
    "docstrings",
    "mathml",
    "repository_links",
]
exclude_patterns = ["gallery/README.md"]  # GitHub's view of gallery/index.md
default_role = "code-or-name"  # of docstrings: see _ext/docstrings.py
python_maximum_signature_line_length = 80

# ---- Markdown ----------------------------------------------------------------------------------------------------------
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
html_math_renderer = "mathml"

# ---- API reference -----------------------------------------------------------------------------------------------------
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
intersphinx_mapping = stored_inventories.mapping(HERE / "_inventories")

# ---- HTML --------------------------------------------------------------------------------------------------------------
html_theme = "pydata_sphinx_theme"
html_title = "diffagents"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {
    page: [] for page in ("index", "quickstart", "install", "which_algorithm", "benchmarks", "zoo", "data", "files")
}
html_sidebars |= {page: [] for page in ("security", "faq", "changelog", "gallery/index")}  # pages without pages below them
html_theme_options = {
    "header_links_before_dropdown": 5,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "navigation_depth": 3,
    "footer_start": ["copyright"],
    "footer_end": [],
}
