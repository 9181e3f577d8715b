"""The page put together: what is carried in the package, and the data in a form that nothing can break.

Names in a run can be anything. Here they are base64 of gzip, so there is nothing to escape; and the page may run
no other script than the two whose checksums its policy names, and ask nobody but the server it came from.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from functools import cache
from importlib.resources import files

__all__ = ["live_html", "report_html"]


def report_html(data: bytes) -> bytes:
    """Return a page that holds `data`, which `payload.packed` has made."""
    text = base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()
    block = f'<script type="application/octet-stream" id="data">{text}</script>'
    return _page("", block, connect="'none'").encode()


def live_html(where: str) -> bytes:
    """Return a page that asks for its data at `where`, again and again."""
    return _page(f' data-live="{where}"', "", connect="'self'").encode()


def _page(attribute: str, data: str, *, connect: str) -> str:
    style = _carried("uPlot.min.css") + _carried("page.css")
    scripts = [_carried("uPlot.iife.min.js"), _carried("page.js")]
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            f"style-src {_hash(style)}",
            "img-src data:",
            f"connect-src {connect}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    parts = {
        "<!--csp-->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "<!--style-->": f"<style>{style}</style>",
        "<!--scripts-->": data + "".join(f"<script>{script}</script>" for script in scripts),
    }
    page = _carried("page.html").replace("<html lang", f"<html{attribute} lang", 1)
    pieces = []
    # Each mark is looked for in the template alone, never in what has taken the place of another.
    for mark, part in parts.items():
        before, _, page = page.partition(mark)
        pieces += [before, part]
    return "".join([*pieces, page])


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _carried(name: str) -> str:
    return files("metricfold.look").joinpath("page", name).read_text("utf-8")
