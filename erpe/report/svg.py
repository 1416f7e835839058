"""A figure as SVG inside an HTML page: text stays text, nothing points outside, no two figures share an id."""

from __future__ import annotations

import io
import re

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

GROWN = 1.4
"""A page has more room than a paper: how much larger a figure may be there."""


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """`<svg role="img">` with `description` for those who do not see it; the same text for the same figure.

    Args:
        name: prefix of the ids, of letters, digits and dashes, its own for each figure of a page.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "erpe"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="([^"]+)"', head)
    assert view is not None
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>|<metadata>.*?</metadata>", "", body, count=2, flags=re.DOTALL)
    body = re.sub(r'( id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;]*; ?", "", body)  # the page has one for all
    width = GROWN * float(view[1].split()[2])
    label = escape(description)
    return Markup(  # matplotlib has escaped what is in the figure
        f'<svg role="img" aria-label="{label}" viewBox="{view[1]}" width="{width:.1f}pt">{body}'
    )
