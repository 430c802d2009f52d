"""How the page looks. One style sheet for phone and desktop, day and night; no font and no image is fetched."""

from __future__ import annotations

# Eight colours that differ in lightness too, after Okabe and Ito's for colour-blind readers (jfly.uni-koeln.de/color),
# darker by day and lighter by night so that each has a contrast of at least 3 : 1 with the page (WCAG 2.2, 1.4.11).
_DAY = ("#0b5fad", "#c04a05", "#00785a", "#9a3c86", "#7d6200", "#2f86ab", "#5a5f66", "#7e2d20")
_NIGHT = ("#6fb4ff", "#ff9a57", "#45cfa2", "#ea9bd6", "#e2c54d", "#92dcf3", "#c3c8cf", "#e9a191")
COLOURS = len(_DAY)

DASHES = ("", "7 3", "2 3", "9 3 2 3")
"""Of lines, one after the other, so that colour is never the only difference."""

_ROOTS = """
:root { color-scheme: light dark; --page: #fcfbf9; --card: #ffffff; --ink: #1c1e21; --soft: #5b6068; --hair: #dcd9d3;
  --grid: #e6e3dd; --bad: #b3261e; %DAY% }
@media (prefers-color-scheme: dark) { :root { --page: #131518; --card: #1a1d21; --ink: #e7e8ea; --soft: #a3a9b2;
  --hair: #33383f; --grid: #2b3036; --bad: #ff8f85; %NIGHT% } }
"""

_RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main, header, footer { max-width: 72rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -.015em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .9rem; padding-top: .9rem; border-top: 1px solid var(--hair); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption span, .note { color: var(--soft); }
.note { font-size: .875rem; }
.lead { font-size: 1.05rem; }
nav { margin: 1rem 0 0; font-size: .9rem; } nav a { margin-right: 1rem; display: inline-block; padding: .2rem 0; }
a { color: var(--c0); }
progress { width: 100%; max-width: 24rem; height: .5rem; accent-color: var(--c0); }
.tiles { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .7rem; margin: 1.6rem 0 0; padding: 0; }
.tiles div { background: var(--card); border: 1px solid var(--hair); border-radius: .6rem; padding: .75rem .85rem; }
.tiles dt { font-size: .82rem; color: var(--soft); }
.tiles dd { margin: 0; }
.tiles .figure { font-size: 1.3rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles .unit { font-size: .82rem; color: var(--soft); }
.charts { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1.1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--hair); border-radius: .6rem;
  padding: .8rem .9rem; }
figcaption { font-weight: 600; line-height: 1.35; } figcaption span { font-weight: 400; font-size: .875rem; }
svg.chart { display: block; width: 100%; height: auto; margin-top: .5rem; }
svg.chart text { fill: var(--soft); font-size: 16px; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { fill: none; stroke-width: 1; stroke-linejoin: round; opacity: .45; }
.session { stroke: var(--soft); stroke-dasharray: 3 4; } .skipped { stroke: var(--bad); stroke-width: 1.5; }
.key { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; margin: .4rem 0 0; padding: 0;
  font-size: .875rem; }
.key li { display: flex; align-items: center; gap: .45rem; } .key svg { width: 1.75rem; height: .8rem; flex: none; }
.bar { display: block; width: 100%; height: 2.2rem; border-radius: .3rem; }
.scroll { overflow-x: auto; margin: .1rem 0 .6rem; }
.scroll:focus-visible, summary:focus-visible, pre:focus-visible, a:focus-visible {
  outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
.scroll > table { overflow-wrap: normal; }
.caption { color: var(--soft); font-size: .875rem; margin: .8rem 0 0; }
th, td { text-align: left; vertical-align: top; padding: .32rem 1.1rem .32rem 0; border-bottom: 1px solid var(--hair); }
thead th { font-weight: 600; font-size: .82rem; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 400; }
.number { text-align: right; } .number, .short { white-space: nowrap; }
.long { min-width: 13rem; overflow-wrap: anywhere; }
.square { vertical-align: -.05em; margin-right: .3rem; }
.facts { width: 100%; } .facts th { color: var(--soft); width: 32%; min-width: 7rem; } .facts td { padding-right: 0; }
details { border: 1px solid var(--hair); border-radius: .6rem; background: var(--card); padding: .2rem .9rem;
  margin: .6rem 0; }
summary { cursor: pointer; padding: .45rem 0; font-weight: 600; }
pre { overflow-x: auto; margin: .4rem 0;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; }
.sample { margin: 0 0 .7rem; padding: .6rem .9rem; border-left: 3px solid var(--c0); background: var(--card);
  white-space: pre-wrap; font: .88rem/1.55 ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; }
.sample b { color: var(--c0); font-weight: 600; }
.when { margin: .9rem 0 .25rem; font-size: .875rem; color: var(--soft); }
footer { margin-top: 3rem; padding-bottom: 2.5rem; font-size: .875rem; color: var(--soft); }
@media (min-width: 46rem) {
  .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  svg.chart text { font-size: 12px; } h1 { font-size: 2.3rem; } .tiles .figure { font-size: 1.5rem; }
}
@media (min-width: 60rem) { .charts { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media print { body { font-size: 12px; } figure, details { break-inside: avoid; } }
"""


def style_sheet() -> str:
    roots = _ROOTS
    for name, colours in (("%DAY%", _DAY), ("%NIGHT%", _NIGHT)):
        roots = roots.replace(name, " ".join(f"--c{index}: {colour};" for index, colour in enumerate(colours)))
    painted = "".join(
        f".line.c{i}, .faint.c{i} {{ stroke: var(--c{i}); }} .mark.c{i}, .part.c{i} {{ fill: var(--c{i}); }}\n"
        for i in range(COLOURS)
    )
    return roots + _RULES + painted
