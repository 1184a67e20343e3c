"""One HTML page without scripts and without a network: every text is escaped, every image lies in the page.

Whatever takes text escapes it; what returns `Markup` is HTML already.
"""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

__all__ = ["Image", "Markup", "document", "folded", "images", "note", "section", "table", "tiles"]

Markup = NewType("Markup", str)

#: nothing is loaded, nothing runs: not even what might slip through the escaping
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #222; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 48px 0 12px; padding-top: 16px; border-top: 1px solid #e4e4e4; }
p { margin: 0 0 12px; max-width: 75ch; }
.quiet, figcaption, footer { color: #666; font-size: .875rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 0; }
.tile { border: 1px solid #e4e4e4; border-radius: 6px; padding: 12px 14px; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: #666; font-size: .8125rem; line-height: 1.35; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0 0 12px; background:
  linear-gradient(to right, #fff 30%, #fff0) left / 32px 100% local,
  linear-gradient(to left, #fff 30%, #fff0) right / 32px 100% local,
  linear-gradient(to right, #0002, #0000) left / 10px 100% scroll,
  linear-gradient(to left, #0002, #0000) right / 10px 100% scroll; background-repeat: no-repeat; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { color: #666; font-size: .8125rem; font-weight: 600; border-bottom-color: #bbb; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.marked td { background: #fdf1e7; }
.images { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 24px;
  margin: 0 0 16px; }
.images.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 640px; height: auto; }
details { margin: 12px 0; }
summary { cursor: pointer; color: #444; }
pre { overflow-x: auto; background: #f7f7f7; padding: 12px; border-radius: 6px; font-size: .8125rem; line-height: 1.4; }
footer { margin-top: 48px; border-top: 1px solid #e4e4e4; padding-top: 12px; }
@media (max-width: 600px) { main { padding: 20px 16px 40px; } h2 { margin-top: 32px; } th, td { padding: 6px 8px; } }
@media print { h2 { break-after: avoid; } figure, .tile { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Image:
    """A PNG with the words for those who do not see it, and a caption."""

    #: of its file, without an ending
    name: str
    png: bytes
    alt: str
    caption: str = ""


def document(title: str, subtitle: str, parts: Sequence[Markup], footer: str) -> str:
    """Return a whole page."""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{_text(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n'
        f'<body>\n<main>\n<h1>{_text(title)}</h1>\n<p class="quiet">{_text(subtitle)}</p>\n{body}\n'
        f"<footer>{_text(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: Markup) -> Markup:
    """Return a titled section."""
    return Markup(f"<section>\n<h2>{_text(title)}</h2>\n" + "\n".join(parts) + "\n</section>")


def note(text: str, *, quiet: bool = True) -> Markup:
    """Return a paragraph."""
    return Markup(f'<p class="quiet">{_text(text)}</p>' if quiet else f"<p>{_text(text)}</p>")


def tiles(facts: Sequence[tuple[str, str]]) -> Markup:
    """Return (figure, what it is) in boxes side by side."""
    boxes = "".join(f'<div class="tile"><b>{_text(a)}</b><span>{_text(b)}</span></div>\n' for a, b in facts)
    return Markup(f'<div class="tiles">\n{boxes}</div>')


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[bool] = ()) -> Markup:
    """Return a table whose first column holds names and all others numbers; marked rows are tinted."""
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in headings)
    lines = []
    for number, row in enumerate(rows):
        kind = ' class="marked"' if marked and marked[number] else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>")
    body = "\n".join(lines)
    return Markup(
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def images(pictures: Sequence[Image], *, small: bool = False) -> Markup:
    """Return images side by side where there is room: two in a row, or three small ones."""
    kind = "images small" if small else "images"
    return Markup(f'<div class="{kind}">\n' + "\n".join(map(_figure, pictures)) + "\n</div>")


def folded(title: str, text: str) -> Markup:
    """Return text as it is, folded away under its title."""
    return Markup(f"<details><summary>{_text(title)}</summary><pre>{_text(text)}</pre></details>")


def _figure(image: Image) -> str:
    data = base64.b64encode(image.png).decode()
    caption = f"<figcaption>{_text(image.caption)}</figcaption>" if image.caption else ""
    return f'<figure><img src="data:image/png;base64,{data}" alt="{_text(image.alt)}">{caption}</figure>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
