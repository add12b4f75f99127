"""Pages inside a notebook's cell."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import quoteattr

from trainfw.report.page import template


def framed(page: str, height: int = 560) -> str:
    """Put a page in a frame of its own, so that its style does not reach the notebook's."""
    return f'<iframe srcdoc={quoteattr(page)} style="width:100%;height:{height}px;border:0"></iframe>'


def findings_page(
    verdict: str, findings: Sequence[Sequence[str]], collectives: Sequence[Sequence[str]], memory: str
) -> str:
    """Fill the page of a check: tables whose first rows are their heads, and the memory of a core in lines."""
    filled = template("findings.html").render(
        verdict=verdict, findings=findings, collectives=collectives, memory=memory
    )
    return str(filled)
