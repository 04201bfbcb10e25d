"""Settings of the documentation: `make docs` builds it into docs/_build/html."""

import os
import posixpath
import re
from pathlib import Path

import gum_optax

ROOT = Path(__file__).resolve().parents[1]

project = "gum_optax"
author = "The gum_optax authors"
copyright = author
version = release = gum_optax.__version__
REPOSITORY = "https://github.com/gum-optax/gum_optax"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
# Links to objects of other packages would need their inventories from the network, which a build
# does not use: such names are shown without a link.
default_role = "py:obj"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
# Docstrings state types in words; annotations would hide the names of parameters.
autodoc_typehints = "none"
# Defaults as in the source, `LowRank()` and not its fields.
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
# A button copies commands and code without their prompts.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = "gum_optax"
html_baseurl = os.environ.get("SITE_URL", "https://gum-optax.github.io/gum_optax/")
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "use_edit_page_button": True,
    "show_toc_level": 2,
    "home_page_in_toc": True,
}

# Links in Markdown, but not images: `](target)` after a text in square brackets.
_LINK = re.compile(r"(?<!!)(\[[^\[\]]*\]\()(?!https?:|#|mailto:)([^)\s#]+)")


def _lead_to_the_repository(app, docname, source):
    """Turns links to files outside of docs/ into links to the repository.

    In a clone and on a forge the relative links work unchanged; only docs/ is on the site.
    """
    here = posixpath.dirname(docname)

    def absolute(match):
        path = posixpath.normpath(posixpath.join("docs", here, match[2]))
        if path.startswith("docs/") or not (ROOT / path).exists():
            return match[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{match[1]}{REPOSITORY}/{kind}/main/{path}"

    source[0] = _LINK.sub(absolute, source[0])


def _name_defaults(app, what, name, obj, options, signature, return_annotation):
    """Shows the call behind a private constant that is the default of a parameter.

    Defaults of fields are shown as values; a function has none that could be read.
    """
    if signature:
        signature = signature.replace("_POLAR", "scale_by_polar()")
        signature = re.sub(r"=<function [\w.]+(<lambda>)?>", "=...", signature)
        return signature, return_annotation
    return None


def _leave_out_tests(app, what, name, obj, options, lines):
    """Leaves out the paragraph of a module's docstring that names its tests, for contributors."""
    for start, line in enumerate(lines):
        if what == "module" and line.startswith("Tests: tests/"):
            end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
            del lines[start:end]
            return


def _leave_out_fields(app, what, name, obj, skip, options):
    """Leaves out fields of NamedTuples: the class describes them, and they have no docstring."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    """Registers the functions of this file with Sphinx."""
    app.connect("source-read", _lead_to_the_repository)
    app.connect("autodoc-process-signature", _name_defaults)
    app.connect("autodoc-process-docstring", _leave_out_tests)
    app.connect("autodoc-skip-member", _leave_out_fields)
