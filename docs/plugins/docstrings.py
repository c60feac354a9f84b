"""An extension of Griffe: what the docstrings write for the terminal becomes Markdown for the pages.

Four things differ: ``.. math::`` directives, roles such as ``:func:``, examples that stand without a heading, and lists
of arguments that begin by pointing to those of another function.
"""

import re
from typing import Any

import griffe

MATH = re.compile(r"^\.\. math:: ((?:.*\S.*(?:\n|$))+)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|mod|data):`([\w.]+)`")
MORE = re.compile(r"^Args: (.+)$(?=\n +\w+: )", re.MULTILINE)
EXAMPLE = re.compile(r"^>>> (?:.*\S.*(?:\n|$))+", re.MULTILINE)


def to_markdown(text: str, module: str) -> str:
    r"""Rewrite a docstring of a module.

    >>> to_markdown("See :func:`trace`, of :class:`pkjax.Report`.", "pkjax.path_kernel")
    'See [`trace`][pkjax.path_kernel.kernel.trace], of [`pkjax.Report`][pkjax.Report].'
    >>> print(to_markdown(".. math:: a \\\\\n    b", "m"))
    $$
    a \\ b
    $$
    >>> to_markdown(">>> 1 + 1\n2", "m")
    '```pycon\n>>> 1 + 1\n2\n```'
    >>> to_markdown("Args: as in ``f``, and\n    k: how many", "m")
    'Arguments: as in ``f``, and\n\nArgs:\n    k: how many'
    """
    def link(found: re.Match[str]) -> str:
        name = found[1]
        return f"[`{name}`][{name if '.' in name else f'{module}.{name}'}]"

    text = MATH.sub(lambda found: f"$$\n{' '.join(found[1].split())}\n$$\n", text)
    text = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
    text = MORE.sub(r"Arguments: \1\n\nArgs:", text)
    return ROLE.sub(link, text).rstrip()


class Docstrings(griffe.Extension):
    """Rewrites every docstring when it has been read."""

    def on_object(self, *, obj: griffe.Object, loader: Any, **_: Any) -> None:
        """Rewrite that of one function, class, attribute or module."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, obj.module.canonical_path)
