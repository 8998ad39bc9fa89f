"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "lightning-unlearn"
author = "The lightning-unlearn contributors"
copyright = author  # the name that Sphinx asks for
release = version = installed_version("lightning-unlearn")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
# No intersphinx: it needs the network, and the build must not.

html_theme = "furo"
html_title = f"lightning-unlearn {release}"
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "groupwise"
autodoc_typehints = "description"
# A parameter's documented type comes from its annotation; undocumented ones (*args of overridden hooks) stay away.
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "extra_repr"}

napoleon_numpy_docstring = False
