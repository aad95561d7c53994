"""The report as one HTML file: no script, nothing loaded from elsewhere, light and dark, readable on a phone. Pure functions from numbers and pictures to text."""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from flowt2i.evaluation.charts import Series, legend

STYLE = """
:root { --bg:#fbfbf9; --card:#fff; --ink:#23262b; --soft:#6b7078; --rule:#e3e3de; --a:#2563c9; --b:#c2570c; --r:#9aa0a8; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --bg:#15171a; --card:#1d2024; --ink:#e6e7e9; --soft:#9aa0a8; --rule:#30343a; --a:#7aabff; --b:#f2a25c; --r:#767c85; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--bg); color:var(--ink); font:16px/1.5 system-ui,sans-serif; -webkit-text-size-adjust:100%; }
main { max-width:1060px; margin:0 auto; padding:28px 18px 60px; }
h1 { font-size:1.7rem; margin:0 0 4px; overflow-wrap:anywhere; } h2 { font-size:1.2rem; margin:40px 0 8px; } h3 { font-size:1rem; margin:0 0 6px; }
p { margin:4px 0 10px; } .soft, figcaption, .legend, td.protocol { color:var(--soft); font-size:.86rem; }
.cards { display:grid; gap:14px; grid-template-columns:repeat(auto-fit,minmax(min(100%,210px),1fr)); }
.charts { display:grid; gap:14px; grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr)); }
.card { background:var(--card); border:1px solid var(--rule); border-radius:10px; padding:14px 16px; min-width:0; }
.big { font-size:1.9rem; font-weight:650; line-height:1.15; font-variant-numeric:tabular-nums; }
.scroll { overflow-x:auto; } table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th,td { text-align:left; padding:5px 14px 5px 0; border-bottom:1px solid var(--rule); vertical-align:baseline; } th { font-weight:600; font-size:.86rem; color:var(--soft); }
td.n { text-align:right; white-space:nowrap; } th.n { text-align:right; } td.protocol { overflow-wrap:anywhere; min-width:150px; }
.meter { display:block; position:relative; height:8px; min-width:110px; background:var(--rule); border-radius:4px; }
.meter i { position:absolute; inset:0 auto 0 0; background:var(--a); opacity:.85; border-radius:4px; }
.meter b { position:absolute; top:3px; height:2px; background:var(--ink); }
.samples { display:grid; gap:16px 12px; grid-template-columns:repeat(auto-fill,minmax(116px,1fr)); }
.pairs { grid-template-columns:repeat(auto-fill,minmax(230px,1fr)); }
figure { margin:0; min-width:0; } figure div { display:flex; gap:4px; } figure img { width:100%; min-width:0; image-rendering:pixelated; border-radius:6px; border:1px solid var(--rule); display:block; }
figcaption { margin-top:5px; line-height:1.35; overflow-wrap:anywhere; }
svg { width:100%; height:auto; display:block; font:12px system-ui,sans-serif; }
svg .grid { stroke:var(--rule); } svg .axis { stroke:var(--soft); } svg text { fill:var(--soft); } svg .tick { font-size:11.5px; }
.line { fill:none; stroke-width:2; stroke-linejoin:round; } .line.a,.bar.a,.dot.a { stroke:var(--a); } .line.b,.bar.b,.dot.b { stroke:var(--b); } .line.r,.bar.r,.dot.r { stroke:var(--r); }
.line.r { stroke-dasharray:5 4; } .bar { stroke-width:2; } .dot { fill:var(--card); stroke-width:2; } .band { opacity:.16; } .band.a { fill:var(--a); } .band.b { fill:var(--b); } .band.r { fill:var(--r); }
.legend { display:flex; flex-wrap:wrap; gap:4px 16px; margin:0 0 4px; } .key { display:inline-block; width:18px; height:3px; margin-right:6px; vertical-align:middle; border-radius:2px; }
.key.a { background:var(--a); } .key.b { background:var(--b); } .key.r { background:var(--r); }
code { font-size:.86em; overflow-wrap:anywhere; } details summary { cursor:pointer; color:var(--soft); }
"""


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole document; sections are HTML already."""
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
    return f"{head}<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1><p class='soft'>{escape(subtitle)}</p>{''.join(sections)}</main></body></html>\n"


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """(name, value, note) as tiles."""
    tile = '<div class="card"><div class="soft">{}</div><div class="big">{}</div><div class="soft">{}</div></div>'
    return f'<div class="cards">{"".join(tile.format(*map(escape, item)) for item in items)}</div>'


def charts(items: Sequence[tuple[str, str, Sequence[Series]]]) -> str:
    """(title, svg, its series for the legend) as tiles."""
    return f'<div class="charts">{"".join(f"""<div class="card"><h3>{escape(title)}</h3>{legend(lines)}{svg}</div>""" for title, svg, lines in items)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), raw: Sequence[int] = ()) -> str:
    """A table; columns `numbers` stand right, columns `raw` are HTML already."""
    mark = lambda k: ' class="n"' if k in numbers else ""
    head = "".join(f"<th{mark(k)}>{escape(cell)}</th>" for k, cell in enumerate(header))
    body = "".join("<tr>" + "".join(f"<td{mark(k)}>{cell if k in raw else escape(cell)}</td>" for k, cell in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def meter(value: float, low: float, high: float) -> str:
    """A share of 1 as a bar with its interval."""
    return f'<span class="meter"><i style="width:{100 * value:.1f}%"></i><b style="left:{100 * low:.1f}%;width:{100 * max(high - low, 0):.1f}%"></b></span>'


def samples(images: Sequence[np.ndarray], captions: Sequence[str]) -> str:
    """Pictures uint8 [H, W, 3], each over its caption."""
    return f'<div class="samples">{"".join(_figure([image], caption) for image, caption in zip(images, captions))}</div>'


def pairs(images: Sequence[Sequence[np.ndarray]], captions: Sequence[str]) -> str:
    """Pairs of pictures, each over its caption."""
    return f'<div class="samples pairs">{"".join(_figure(pair, caption) for pair, caption in zip(images, captions))}</div>'


def _figure(images: Sequence[np.ndarray], caption: str) -> str:
    shown = "".join(f'<img alt="" src="{data_uri(image)}">' for image in images)
    return f"<figure><div>{shown}</div><figcaption>{escape(caption)}</figcaption></figure>"


def data_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a PNG inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
