"""Sphinx's settings for the book of all notebooks: `make book` writes it to results/book/html.

The source is the repository itself, so links between README, notebooks and figures hold as they are. Nothing is
executed and no page asks for anything from elsewhere, so the book is built and read without a network.
"""

import shutil
import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from causaldpo_lib import __version__, book  # noqa: E402

project = html_title = "CausalDPO Study"
author = "CausalDPO Study contributors"
copyright = author  # without a year: the same sources make the same pages
release = __version__
root_doc = "README"

extensions = ["myst_nb"]
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "notebooks/[0-9]*.ipynb"]
# Only to be quick: these folders hold many files, and no page.
exclude_patterns = [".*", "results", "data", "build", "dist", "**/.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # formulas in takeaways
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_allow_digits = False  # "$5 and $6" is no formula
myst_heading_anchors = 3
nitpicky = True

html_theme = "furo"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = False
html_last_updated_fmt = None
# Drawn as SVG, MathJax is one file and needs no fonts, which some browsers refuse to pages opened from a disk.
MATHJAX = "tex-svg.js"
mathjax_path = MATHJAX


def front_page(app, name, source):
    """Put the contents before the README's first section, and numbers before the notebooks' titles."""
    if name == root_doc:
        start, heading, rest = source[0].partition("\n## ")
        pages = "```{toctree}\n:caption: About\n:maxdepth: 1\n\n/CONTRIBUTING\n/CHANGELOG\n```"
        notebooks = book.contents(Path(app.srcdir) / "notebooks")
        source[0] = f"{start}\n## Contents\n\n{notebooks}\n\n{pages}\n{heading}{rest}"
    elif name.startswith("notebooks/"):
        source[0] = book.numbered(source[0], Path(name).name)


def finish(app, error):
    """Copy MathJax, and the front page under the name that browsers look for."""
    if error or app.builder.format != "html":
        return
    packed = files("mathjax") / "static" / "mathjax"
    shutil.copyfile(packed / "es5" / MATHJAX, Path(app.outdir) / "_static" / MATHJAX)
    shutil.copyfile(packed / "LICENSE", Path(app.outdir) / "_static" / "mathjax-license.txt")
    shutil.copyfile(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", front_page)
    app.connect("build-finished", finish)
