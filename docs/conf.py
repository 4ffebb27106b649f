"""The documentation site: `make docs` writes it to build/docs."""

from importlib import metadata

import vitreg

project = "vitreg"
copyright = "the maintainers of vitreg, Apache-2.0"
version = release = metadata.version("vitreg")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "index"
html_theme = "furo"
html_static_path, html_css_files = ["static"], ["site.css"]
html_title = f"vitreg {version}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# Tutorials are run when the site is built; a cell that fails fails the build.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True

default_role = "py:obj"  # backticks in docstrings are names, and links where the name is in the reference
suppress_warnings = ["ref.python"]  # Sphinx looks for a link from each attribute's name, and two classes may have one
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False  # they are in the signature
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True


def _once(app, what, name, obj, skip, options):
    """Names of `vitreg` itself are on its own page, not on those of the rooms."""
    room = app.env.current_document.docname.removeprefix("api/")
    return True if room != "index" and name in vitreg.__all__ and getattr(vitreg, name) is obj else None


def setup(app):
    app.connect("autodoc-skip-member", _once)
