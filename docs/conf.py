"""Settings of the site that `make site` builds of these pages, by Sphinx."""

project = "mien"
copyright = "the authors of mien"  # noqa: A001
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "mien"
html_show_sphinx = False
myst_heading_anchors = 3  # so that a link may name a heading, as on the pages of a repository
exclude_patterns = ["_build"]
