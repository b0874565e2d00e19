"""Formulas without a network: LaTeX between dollars becomes MathML, which browsers draw themselves."""

from __future__ import annotations

import re

_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)
_DISPLAY = re.compile(r"^( *)\$\$(.+?)\$\$", flags=re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<![\\$\w])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])")


def to_mathml(latex: str, display: bool) -> str:
    """One formula as MathML; a formula that cannot be read stops the build."""
    from latex2mathml.converter import convert

    # \mathrm{NRA} as one word: the converter makes a row of single letters, which screen readers spell out.
    words = re.sub(r"\\(?:mathrm|text|operatorname)\{([^}]*)\}", r"\\text{\1}", latex)
    found = convert(" ".join(words.split()), display="block" if display else "inline")
    # Inside Markdown a line that begins with <math> would become a paragraph of its own.
    return f'<div class="formula">{found}</div>' if display else f"<span>{found}</span>"


def render(markdown: str) -> str:
    """Markdown with ``$$ ... $$`` and ``$ ... $`` replaced; code is left alone.

    >>> render("cost `$x$`")
    'cost `$x$`'
    """
    parts = _CODE.split(markdown)
    for k in range(0, len(parts), 2):
        text = _DISPLAY.sub(lambda found: f"\n{found[1]}{to_mathml(found[2], True)}\n", parts[k])
        parts[k] = _INLINE.sub(lambda found: to_mathml(found[1], False), text)
    return "".join(parts)
