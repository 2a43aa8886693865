"""The report's style sheet: one column of text, cards of charts, light and dark, wide and narrow."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fcfcfb; --card: #ffffff; --ink: #1b1f24; --soft: #5d6670; --faint: #8b949e;
  --rule: #e4e7ea; --grid: #eceff1;
  --c1: #2458c5; --c2: #c2410c; --c3: #0f766e; --c4: #7c3aed; --c0: #8b949e;
  --right: #15803d; --wrong: #b91c1c; --right-tint: #e9f6ee; --wrong-tint: #fbeeee;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #181c21; --ink: #e6e9ec; --soft: #a3acb6; --faint: #79838e;
    --rule: #2a3037; --grid: #242a31;
    --c1: #7aa5ff; --c2: #fb923c; --c3: #4fd1c0; --c4: #b69cff; --c0: #79838e;
    --right: #5cd08a; --wrong: #f48a8a; --right-tint: #16281d; --wrong-tint: #2d1c1d;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1120px; margin: 0 auto; padding: 56px 32px 80px; }
header .overline { color: var(--soft); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; margin: 0; }
h1 { font-size: 38px; line-height: 1.15; letter-spacing: -.022em; margin: 8px 0 14px; font-weight: 680; text-wrap: balance; }
.lead { font-size: 19px; line-height: 1.5; color: var(--soft); max-width: 46em; margin: 0 0 28px; }
.lead strong { color: var(--ink); font-weight: 620; }
.facts { display: flex; flex-wrap: wrap; gap: 14px 40px; margin: 0; padding: 18px 0; border-top: 1px solid var(--rule); border-bottom: 1px solid var(--rule); }
.facts div { min-width: 0; }
.facts dt { color: var(--soft); font-size: 13px; }
.facts dd { margin: 0; font-weight: 560; overflow-wrap: anywhere; }
section { margin-top: 60px; }
h2 { font-size: 24px; letter-spacing: -.012em; margin: 0 0 6px; font-weight: 660; }
h3 { font-size: 17px; margin: 34px 0 12px; font-weight: 640; }
p { max-width: 46em; margin: 0 0 18px; }
.note { color: var(--soft); font-size: 15px; }
.cards { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); }
.cards.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.cards.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); }
figure { margin: 0; padding: 16px 18px 12px; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; min-width: 0; }
figcaption { margin-bottom: 10px; font-size: 14.5px; line-height: 1.4; font-weight: 600; }
figcaption small { display: block; font-weight: 400; font-size: 13px; color: var(--soft); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg .strong, svg .row { fill: var(--ink); font-size: 12.5px; }
svg .value { fill: var(--ink); font-size: 13px; font-weight: 640; paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .interval { fill: var(--ink); font-size: 12px; }
svg .name { font-size: 12.5px; font-weight: 600; }
svg .grid { stroke: var(--grid); stroke-width: 1; fill: none; }
svg .zero { stroke: var(--faint); stroke-width: 1; fill: none; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .line.raw { stroke-width: 1; opacity: .28; } svg .line.bold { stroke-width: 2.6; } svg .line.thin { stroke-width: 1.5; opacity: .75; }
svg .whisker { fill: none; stroke-width: 2; stroke-linecap: round; opacity: .55; } svg .whisker.wide { stroke-width: 6; opacity: .32; } svg .whisker.tall { stroke-width: 7; opacity: .3; stroke-linecap: butt; }
svg .dot { stroke: var(--card); stroke-width: 1.5; }
svg .line.c0, svg .whisker.c0 { stroke: var(--c0); } svg .dot.c0, svg .name.c0 { fill: var(--c0); }
svg .line.c1, svg .whisker.c1 { stroke: var(--c1); } svg .dot.c1, svg .name.c1 { fill: var(--c1); }
svg .line.c2, svg .whisker.c2 { stroke: var(--c2); } svg .dot.c2, svg .name.c2 { fill: var(--c2); }
svg .line.c3, svg .whisker.c3 { stroke: var(--c3); } svg .dot.c3, svg .name.c3 { fill: var(--c3); }
svg .line.c4, svg .whisker.c4 { stroke: var(--c4); } svg .dot.c4, svg .name.c4 { fill: var(--c4); }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: middle; margin-right: 5px; }
.key:not(:first-child) { margin-left: 10px; }
svg .bar.c1 { fill: var(--c1); opacity: .85; } svg .bar.c0 { fill: var(--c0); opacity: .45; }
.key.c0 { background: var(--c0); } .key.c1 { background: var(--c1); } .key.c2 { background: var(--c2); }
.scroll { overflow-x: auto; }
.cards + .scroll { margin-top: 26px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 500; font-size: 13px; vertical-align: bottom; }
td small { color: var(--soft); font-size: 13px; }
td strong { font-weight: 640; }
tbody tr:last-child td { border-bottom: 0; }
.heat { table-layout: fixed; min-width: 560px; } .heat th:first-child { width: 24%; } .heat th { border-bottom: 0; }
.heat td:not(:first-child) { background: color-mix(in srgb, var(--c1) calc(var(--share) * 46%), transparent); text-align: center; border: 2px solid var(--page); border-right: 0; border-top: 0; }
.heat th:not(:first-child) { text-align: center; } .heat td:first-child { border-bottom: 0; }
details.sample { border: 1px solid var(--rule); border-radius: 10px; background: var(--card); margin-bottom: 12px; }
details.sample > summary { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: baseline; justify-content: space-between; padding: 13px 18px; cursor: pointer; list-style: none; }
details.sample > summary::-webkit-details-marker { display: none; }
.question { flex: 1 1 26em; font-weight: 560; overflow-wrap: anywhere; white-space: pre-wrap; }
.question small { display: block; font-weight: 400; color: var(--soft); font-size: 13px; margin-top: 2px; }
.marks { white-space: nowrap; letter-spacing: .18em; font-weight: 700; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.answers { display: grid; gap: 8px; padding: 0 18px 18px; }
.answer { display: grid; grid-template-columns: 112px 1fr; gap: 12px; padding: 10px 14px; border-radius: 8px; background: var(--wrong-tint); }
.answer.ok { background: var(--right-tint); }
.answer b { font-weight: 600; font-size: 14px; } .answer b span { display: block; font-weight: 500; font-size: 13px; }
pre { margin: 0; max-height: 15em; overflow-y: auto; font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
details.more { margin-top: 14px; }
details.more > summary { cursor: pointer; color: var(--soft); font-size: 15px; padding: 6px 0; }
details.more[open] > summary { margin-bottom: 10px; }
.settings { margin-top: 16px; columns: 3 280px; column-gap: 36px; font-size: 14px; }
.settings div { break-inside: avoid; margin-bottom: 20px; }
.settings h4 { margin: 0 0 4px; font-size: 14px; font-weight: 640; }
.settings table { font-size: 13.5px; } .settings td { padding: 3px 0; white-space: normal; overflow-wrap: anywhere; } .settings td:first-child { color: var(--soft); padding-right: 14px; }
footer { margin-top: 64px; padding-top: 18px; border-top: 1px solid var(--rule); color: var(--soft); font-size: 14px; }
@media (max-width: 640px) {
  main { padding: 28px 16px 56px; }
  h1 { font-size: 28px; } .lead { font-size: 17px; } h2 { font-size: 21px; } section { margin-top: 44px; }
  .facts { gap: 12px 28px; } figure { padding: 12px 12px 8px; }
  .answer { grid-template-columns: 1fr; gap: 4px; } .answer b span { display: inline; margin-left: 8px; }
  th, td { padding: 7px 9px; } table { font-size: 14px; }
  .cards.wide svg .tick { font-size: 12.5px; } .cards.wide svg .value { font-size: 14.5px; }
  .heat { min-width: 0; font-size: 12.5px; } .heat th, .heat td { padding: 7px 1px; font-size: 12.5px; } .heat th:first-child { width: 27%; } .heat td small { display: block; font-size: 11.5px; }
}
@media print { main { max-width: none; padding: 0; } figure, details.sample { break-inside: avoid; } }
"""
