"""HTML for reports and traces: pages that open offline, light and dark, and tables for notebooks."""

from __future__ import annotations

import html
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ("legend", "page", "table", "timeline_page")

# Kinds of work, in the order of the legend, with the class of their color.
_KINDS = ("computing", "receiving", "sending", "waiting", "pickling", "unpickling")

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --muted: #59636e; --back: #fff; --line: #d1d9e0;
  --computing: #0f6cbd; --receiving: #8a6100; --sending: #a1357b; --waiting: #d1d9e0; --pickling: #1a7f37;
  --unpickling: #7a4fc4; --hint: #fff8c5; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --muted: #9ba5b0; --back: #14181e; --line: #3d444d;
  --computing: #59a6f0; --receiving: #d9a521; --sending: #e07ab8; --waiting: #3d444d; --pickling: #4ac26b;
  --unpickling: #b191f0; --hint: #3b3100; } }
body { margin: 1rem auto; max-width: 75rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 1.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { white-space: nowrap; }
.bar { display: flex; min-width: 10rem; height: .9rem; } .bar span { display: block; height: 100%; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1rem; color: var(--muted); padding: 0; list-style: none; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; vertical-align: -1px; }
.computing { background: var(--computing); } .receiving { background: var(--receiving); }
.sending { background: var(--sending); } .waiting { background: var(--waiting); }
.pickling { background: var(--pickling); } .unpickling { background: var(--unpickling); }
.hint { background: var(--hint); padding: .5rem .75rem; border-radius: 4px; overflow-wrap: anywhere; }
canvas { display: block; width: 100%; touch-action: pan-y; } .muted { color: var(--muted); }
button { font: inherit; padding: 0 .6rem; } #told { min-height: 1.5em; overflow-wrap: anywhere; }
@media (max-width: 38rem) { body { padding: 0 .6rem; } th, td { padding-right: .5rem; font-size: .85rem; }
  .workers thead { display: none; } .workers, .workers tbody { display: block; }
  .workers tr { display: flex; flex-wrap: wrap; gap: 0 .9rem; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  .workers td { border: 0; padding: 0; } .workers td.name, .workers td.shares { flex-basis: 100%; }
  .workers td.n::before { content: attr(data-of) " "; color: var(--muted); } }
"""

# Draws the timeline. Ctrl and the wheel, or the buttons, zoom; dragging moves; a line below describes the bar.
_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("timeline"), told = document.getElementById("told");
const colors = getComputedStyle(document.documentElement), row = 42, top_ = 22;
let from = 0, to = data.end, drag = null, width = 0;
const style = name => colors.getPropertyValue("--" + name).trim();
function show(us) {
  if (us < 1000) return us ? us.toFixed(0) + " us" : "0";
  return us < 1e6 ? Number((us / 1e3).toPrecision(4)) + " ms" : Number((us / 1e6).toPrecision(4)) + " s";
}
function draw() {
  const scale = window.devicePixelRatio || 1, height = top_ + row * data.rows.length + 6;
  width = canvas.parentElement.clientWidth;
  canvas.style.height = height + "px"; canvas.width = width * scale; canvas.height = height * scale;
  const c = canvas.getContext("2d"), x = us => (us - from) / (to - from) * width;
  c.scale(scale, scale); c.clearRect(0, 0, width, height);
  c.font = "12px system-ui, sans-serif"; c.textBaseline = "middle";
  const step = 10 ** Math.floor(Math.log10((to - from) / Math.max(2, width / 160)));
  const every = [1, 2, 5, 10].map(n => n * step).find(n => (to - from) / n <= Math.max(2, width / 110));
  c.fillStyle = style("muted"); c.strokeStyle = style("line");
  for (let t = Math.ceil(from / every) * every; t < to; t += every) {
    c.beginPath(); c.moveTo(x(t), top_); c.lineTo(x(t), height); c.stroke();
    if (x(t) < width - 60) c.fillText(show(t), x(t) + 3, 10);
  }
  const paint = data.kinds.map(style), back = style("back");
  data.rows.forEach((r, i) => {
    const y = top_ + i * row + 14;
    c.fillStyle = style("muted"); c.fillText(r.name, 2, y - 5);
    for (const [start, long, kind, name] of r.events) {
      const a = Math.max(0, x(start)), b = Math.min(width, Math.max(x(start + long), x(start) + 0.6));
      if (b < 0 || a > width) continue;
      const idle = data.kinds[kind] === "waiting";
      c.fillStyle = paint[kind]; c.fillRect(a, y + (idle ? 8 : 2), b - a, idle ? 8 : 20);
      if (b - a > 60 && data.kinds[kind] === "computing") {
        c.save(); c.beginPath(); c.rect(a, y, b - a - 4, row); c.clip();
        c.fillStyle = back; c.fillText(data.names[name], a + 4, y + 12); c.restore();
      }
    }
  });
}
function zoom(by, at) {
  const middle = from + (to - from) * at, span = Math.min(data.end, Math.max(10, (to - from) * by));
  from = Math.max(0, Math.min(data.end - span, middle - span * at)); to = from + span; draw();
}
function find(event) {
  const box = canvas.getBoundingClientRect();
  const at = from + (event.clientX - box.left) / width * (to - from);
  const r = data.rows[Math.floor((event.clientY - box.top - top_) / row)];
  const near = (to - from) / width, found = r && r.events.find(e => at >= e[0] - near && at <= e[0] + e[1] + near);
  const what = found && [data.kinds[found[2]], data.names[found[3]]].filter(Boolean).join(" ");
  told.textContent = !r ? "" : !found ? r.name
    : r.name + ": " + what + ", " + show(found[1]) + " from " + show(found[0]) + found[4];
}
canvas.addEventListener("wheel", e => {
  if (!e.ctrlKey && !e.metaKey) return;
  e.preventDefault(); zoom(e.deltaY > 0 ? 1.25 : 0.8, e.offsetX / width);
}, { passive: false });
canvas.addEventListener("pointerdown", e => { drag = [e.clientX, from]; canvas.setPointerCapture(e.pointerId); });
canvas.addEventListener("pointerup", () => { drag = null; });
canvas.addEventListener("pointermove", e => {
  if (drag) {
    const span = to - from, moved = drag[1] - (e.clientX - drag[0]) / width * span;
    from = Math.max(0, Math.min(data.end - span, moved)); to = from + span; draw();
  }
  find(e);
});
const button = id => document.getElementById(id);
button("in").addEventListener("click", () => zoom(0.5, 0.5));
button("out").addEventListener("click", () => zoom(2, 0.5));
button("all").addEventListener("click", () => { from = 0; to = data.end; draw(); });
addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Return an HTML table; columns with the given numbers are aligned to the right.

    Each cell has its own alignment, because notebooks align the text of all cells to the right.
    """
    right = frozenset(numbers)

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(f"<{tag}{kind_of(at)}>{html.escape(text)}</{tag}>" for at, text in enumerate(texts))

    def kind_of(column: int) -> str:
        if column in right:
            return ' class="n" style="text-align: right; white-space: nowrap"'
        # The text beside the numbers may hold a long name; the first column is the name of a row.
        return f' style="text-align: left{"; overflow-wrap: anywhere" if column else "; white-space: nowrap"}"'

    head = f"<thead><tr>{cells('th', headings)}</tr></thead>" if headings else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def legend(kinds: Iterable[tuple[str, str]]) -> str:
    """Return a legend: the classes of the colors, each with its text."""
    return (
        '<ul class="key">'
        + "".join(f'<li><i class="{kind}"></i>{html.escape(text)}</li>' for kind, text in kinds)
        + "</ul>"
    )


def page(title: str, body: str) -> str:
    """Return a page that opens without a network."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><link rel='icon' href='data:,'><style>{_STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def timeline_page(events: Iterable[dict[str, Any]], below: str, dropped: int) -> str:
    """Return a page with a timeline of trace events.

    Args:
        events: Events of Chrome's "Trace Event Format", as `Trace` makes them.
        below: HTML that is shown below the timeline.
        dropped: Number of tasks and events that were dropped.
    """
    labels: dict[tuple[int, int], str] = {}
    order: dict[int, int] = {}
    rows: dict[tuple[int, int], list[list[Any]]] = {}
    kinds = {kind: number for number, kind in enumerate(_KINDS)}
    names: dict[str, int] = {}
    end = 1
    for event in events:
        at = (event["pid"], event["tid"])
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                labels[at] = event["args"]["name"]
            elif event["name"] == "process_sort_index":
                order[event["pid"]] = event["args"]["sort_index"]
            continue
        args, kind = event["args"], event["cat"]
        note = "".join(
            f", {args[key]:,} bytes of {what}"
            for key, what in (("argument_bytes", "arguments"), ("result_bytes", "result"))
            if args.get(key)
        )
        note += ", failed" * bool(args.get("failed")) + ", unfinished" * bool(args.get("unfinished"))
        name = args.get("function", event["name"] if event["name"] != kind else "")
        number = names.setdefault(name, len(names))
        rows.setdefault(at, []).append([event["ts"], event["dur"], kinds.setdefault(kind, len(kinds)), number, note])
        end = max(end, event["ts"] + event["dur"])
    places = sorted(rows, key=lambda at: (order.get(at[0], 0), at))
    data = {
        "end": end,
        "kinds": list(kinds),
        "names": list(names),
        "rows": [{"name": labels.get(at, f"{at[0]}/{at[1]}"), "events": rows[at]} for at in places],
    }
    # Inside a script element only "</" could end it early.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    title = f"Trace of a pool, {end / 1e6:.3f} s"
    lost = f"<p>{dropped:,} tasks or events were dropped: the rings were full.</p>" if dropped else ""
    body = (
        f"<h1>{title}</h1>{legend((kind, kind) for kind in kinds)}"
        "<p><button id='in'>+</button> <button id='out'>-</button> <button id='all'>all</button> "
        "<span class='muted'>Drag to move; Ctrl and the wheel to zoom; point at a bar to read it.</span></p>"
        "<div><canvas id='timeline' role='img' aria-label='Timeline of the workers and threads'></canvas></div>"
        f"<p id='told' class='muted' aria-live='polite'></p>{lost}"
        f"{below}"
        f"<script type='application/json' id='data'>{embedded}</script><script>{_SCRIPT}</script>"
    )
    return page(title, body)
