"""How Sphinx makes the site of these pages: `make docs`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "src"))

import metricfold

SOURCES = "https://github.com/metricfold/metricfold/blob/main"

project = "metricfold"
author = "The metricfold developers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name
release = version = metricfold.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
nitpicky = True
# Without a network there is no telling where others describe theirs.
nitpick_ignore_regex = [("py:.*", r"(numpy|lightning|flax|collections|enum|abc)\..*")]

html_theme = "furo"
html_title = f"metricfold {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
napoleon_use_ivar = True


def to_sources(app, name, content):
    """Let links out of the pages lead to the repository: a site has no file beside it."""
    content[0] = re.sub(r"\]\(\.\./([^)#]+)", rf"]({SOURCES}/\1", content[0])


def in_code(app, what, name, thing, options, lines):
    """Set as code what docstrings hold of it: names in single quotes, and what is indented behind a blank line."""
    written = []
    before, blank = 0, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        text = next((one for one in reversed(written) if one.strip()), "")
        if line.strip() and blank and indent > before and not text.endswith("::") and text:
            written += [" " * before + "::", ""]
        if line.strip():
            before = indent
        blank = not line.strip()
        written.append(re.sub(r"(?<![`:\w])`([^`\n]+)`(?!`)(\w*)", _as_code, line))
    lines[:] = written


def _as_code(found):
    # An ending right behind it, as in `Metric`s, must be told from it.
    return f"``{found[1]}``" + (rf"\ {found[2]}" if found[2] else "")


def setup(app):
    app.connect("source-read", to_sources)
    app.connect("autodoc-process-docstring", in_code, priority=1)
