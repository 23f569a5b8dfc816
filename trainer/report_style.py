"""Style sheet of the report: one page, light and dark, no external reference."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b1f27; --soft: #5d6675; --rule: #e1e5eb;
  --grid: #e9ecf1; --accent: #2563eb; --good: #15803d; --bad: #b91c1c;
  --s1: #2563eb; --s2: #d9480f; --s3: #0f8a6d; --s4: #9333ea; --s5: #b7860b; --s6: #64748b; }
@media (prefers-color-scheme: dark) { :root { --page: #12151b; --card: #1a1f28; --ink: #e8ebf0; --soft: #9aa4b2;
  --rule: #2b3240; --grid: #262d39; --accent: #7aa7ff; --good: #4ade80; --bad: #f87171;
  --s1: #7aa7ff; --s2: #ff9f5a; --s3: #4fd1ac; --s4: #c89bff; --s5: #e8c24a; --s6: #94a3b8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 64px; }
header { margin-bottom: 24px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.01em; margin: 0 0 6px; }
h2 { font-size: 18px; letter-spacing: -0.005em; margin: 0 0 4px; }
p { margin: 0 0 10px; } p.about, figcaption { color: var(--soft); font-size: 13.5px; max-width: 78ch; }
.status { color: var(--soft); } .status b { color: var(--ink); font-weight: 600; }
.badge { display: inline-block; padding: 1px 10px; border-radius: 99px; font-size: 12.5px; font-weight: 600;
  border: 1px solid currentColor; margin-right: 8px; }
.badge.good { color: var(--good); } .badge.bad { color: var(--bad); } .badge.open { color: var(--s5); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 20px 22px;
  margin: 0 0 18px; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(216px, 1fr));
  margin-bottom: 18px; }
.tile { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: 14px 16px; }
.tile .name { color: var(--soft); font-size: 12.5px; } .tile .note { color: var(--soft); font-size: 12.5px; }
.tile .value { font-size: 26px; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums;
  line-height: 1.3; }
.tile .unit { font-size: 13px; font-weight: 500; color: var(--soft); letter-spacing: 0; margin-left: 4px; }
.pair { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); }
.pair section { margin: 0; } .pair { margin-bottom: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums;
  margin-top: 8px; }
th { text-align: left; color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--rule);
  padding: 5px 14px 5px 0; }
td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
td.number, th.number { text-align: right; } tr:last-child td { border-bottom: 0; }
.scroll { overflow-x: auto; }
code, pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--page); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; margin: 8px 0 0;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
pre.config { white-space: pre; max-height: 460px; overflow-y: auto; }
pre + p, .scroll + p { margin-top: 16px; } td:first-child { white-space: nowrap; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--accent); font-size: 13.5px; }
.hash { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.ci { color: var(--soft); font-size: 12px; white-space: nowrap; } td.number .ci { display: block; line-height: 1.3; }
.chip { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px;
  background: currentColor; }
.chip.s1 { color: var(--s1); } .chip.s2 { color: var(--s2); } .chip.s3 { color: var(--s3); }
.chip.s4 { color: var(--s4); } .chip.s5 { color: var(--s5); } .chip.s6 { color: var(--s6); }
.empty { color: var(--soft); font-style: italic; }
footer { color: var(--soft); font-size: 12.5px; margin-top: 28px; }
figure { margin: 12px 0 0; } svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
svg .tick { font-variant-numeric: tabular-nums; } svg .tick.y, svg .note.end { text-anchor: end; }
svg .tick.x, svg .label, svg .nodata { text-anchor: middle; } svg .nodata { font-size: 15px; font-style: italic; }
svg .key { fill: var(--ink); } svg .grid { stroke: var(--grid); } svg .axis, svg .stub { stroke: var(--soft);
  stroke-opacity: .6; }
svg .mark { stroke: var(--soft); stroke-dasharray: 3 4; stroke-opacity: .8; }
svg .line { fill: none; stroke: currentColor; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
svg .line.faint { stroke-width: 1; stroke-opacity: .35; } svg .line.dashed { stroke-dasharray: 7 5; }
svg .band { fill: currentColor; fill-opacity: .14; stroke: none; }
svg .whisker { stroke: currentColor; stroke-width: 5; stroke-opacity: .25; }
svg .dot { fill: currentColor; stroke: var(--card); stroke-width: 1.2; }
svg .s1 { color: var(--s1); } svg .s2 { color: var(--s2); } svg .s3 { color: var(--s3); }
svg .s4 { color: var(--s4); } svg .s5 { color: var(--s5); } svg .s6 { color: var(--s6); }
@media print { body { background: none; } section, .tile { break-inside: avoid; } pre.config { max-height: none; } }
"""
