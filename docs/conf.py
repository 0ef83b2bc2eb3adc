"""Sphinx's settings for docs/, and three hooks: links that also hold on GitHub, Hugging Face's docstrings, formulas.

The pages are the Markdown files beside this one, and those of `GUIDES`, which lie with the scripts that they explain.
Nothing here or in what is built asks the network for anything.
"""

import os
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import hf_dalle


ROOT = Path(__file__).resolve().parents[1]
# Pages that are written elsewhere: what stands under the page's name here is for readers of the folder alone.
GUIDES = {
    "scale": "training/README.md",
    "evaluate_pictures": "training/evaluation/README.md",
    "convert": "conversion/README.md",
    "contributing": "CONTRIBUTING.md",
}
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)")
MARKDOWN = re.compile(
    r"(?m)^(?P<indent> *)```\w*\n(?P<fence>(?:.*\n)*?) *```$"
    r"|\[`(?P<short>~?)(?:hf_dalle\.)?(?P<name>[^`]+)`\]"
    r"|\[(?P<words>[^\]`]+)\]\((?P<address>https?:[^)]+)\)"
    r"|(?<!`)`(?P<code>[^`]+)`(?!`)"
    r"|(?<=: )(?P<letter>[A-Z])\.(?= )"  # which would begin a list
    r"|\|"  # which would begin a substitution
)

project, author = "hf-dalle", "the hf-dalle contributors"
version = release = hf_dalle.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "dvae_study_template.md"]

html_theme, html_title = "furo", f"hf-dalle {release}"
html_static_path, html_css_files = ["_static"], ["docs.css"]
html_show_sphinx = html_show_copyright = html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100


def place_links(text: str, place: Path, docname: str) -> str:
    """A page's text whose relative links, which lead from `place`, lead to the same from the page that is built."""
    docs = ROOT / "docs"
    pages = {ROOT / path: docs / f"{name}.md" for name, path in GUIDES.items()}

    def replace(match: re.Match) -> str:
        target = (place / match[1]).resolve()
        is_page = target in pages or docs in target.parents
        # Markdown that is no page is offered as a file, as anything else is.
        scheme = "path:" if target.suffix == ".md" and not is_page else ""
        return f"]({scheme}{os.path.relpath(pages.get(target, target), (docs / docname).parent)}"

    return LINK.sub(replace, text)


def read_page(app, docname: str, source: list[str]) -> None:
    """Puts a guide in the place of its page, and places the links of every page."""
    path = ROOT / GUIDES[docname] if docname in GUIDES else Path(app.env.doc2path(docname))
    if docname in GUIDES:
        app.env.note_dependency(str(path))
        source[0] = path.read_text(encoding="utf-8")
    source[0] = place_links(source[0], path.parent, docname)


def translate_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """The Markdown of Hugging Face's docstrings (`code`, [`Class`], [words](address), fences) as reStructuredText."""
    text = MARKDOWN.sub(_translate, "\n".join(lines))
    # Of a property napoleon takes what stands before a colon for its type.
    lines[:] = (text.replace(": ", " – ", 1) if what == "property" else text).split("\n")


def _translate(match: re.Match) -> str:
    part = match.groupdict()
    if part["fence"]:
        code = [f"{part['indent']}    {line.removeprefix(part['indent'])}" for line in part["fence"].split("\n")]
        return "\n".join([f"{part['indent']}.. code-block:: python", "", *code, ""])
    if part["name"]:
        return f":py:obj:`{part['short']}.{part['name']}`"
    if part["words"]:
        return f"`{part['words']} <{part['address']}>`__"
    if part["code"]:
        return f"``{part['code']}``"
    return f"{part['letter']}\\." if part["letter"] else "\\|"


def visit_math(translator, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers show by themselves."""
    is_block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=is_block)
    # The space that follows a function's name, which browsers do not make by themselves.
    translator.body.append(formula.replace("<mo>&ApplyFunction;</mo>", '<mo rspace="0.17em">&ApplyFunction;</mo>'))
    raise nodes.SkipNode


def setup(app) -> dict:
    """Connects the hooks; docstrings are translated before napoleon reads them."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", translate_docstring, priority=400)
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math, None))
    return {"parallel_read_safe": True}
