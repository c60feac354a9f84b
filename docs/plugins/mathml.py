"""A hook of MkDocs: formulae in LaTeX become MathML while the pages are built.

Browsers draw MathML themselves, so that the pages hold no script and load nothing from elsewhere.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</\1>', re.DOTALL)


def to_mathml(page: str) -> str:
    r"""Replace what Arithmatex has marked as a formula, in a paragraph or on lines of its own.

    >>> to_mathml(r'<span class="arithmatex">\(x\)</span>')
    '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline"><mrow><mi>x</mi></mrow></math>'
    """
    def replace(formula: re.Match[str]) -> str:
        return convert(html.unescape(formula["tex"]).strip(), display="inline" if formula["open"] == "(" else "block")

    return FORMULA.sub(replace, page)


def on_page_content(html: str, **_: Any) -> str:
    """Do so for a page, when its Markdown has become HTML."""
    return to_mathml(html)
