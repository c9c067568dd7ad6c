"""How the page looks: light and dark as the reader's device has it, one column on a phone, black on white on paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --faint: #5d6670; --paper: #ffffff; --card: #f4f6f8;
  --line: #d5dade; --bad: #9c2b20; --badcard: #fbeeec; --link: #1f5f9e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --faint: #a2abb4; --paper: #15181b; --card: #1e2226;
  --line: #363c43; --bad: #ff9d90; --badcard: #2f1f1d; --link: #86bdf2; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1rem; max-width: 74rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.3rem; margin: 2.2rem 0 .6rem; padding-top: .7rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
h4 { font-size: .95rem; margin: 1.1rem 0 .3rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 48rem; overflow-wrap: anywhere; }
a { color: var(--link); }
code { font: .9em ui-monospace, SFMono-Regular, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
nav ul { list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.note, .made, figcaption, caption { color: var(--faint); font-size: .875rem; }
.problem { background: var(--badcard); color: var(--bad); border-left: 4px solid var(--bad);
  padding: .5rem .75rem; border-radius: 0 4px 4px 0; }
.wide { overflow-x: auto; margin: .6rem 0; }
.wide:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .9rem; min-width: min(100%, 20rem); }
caption { text-align: left; caption-side: top; padding-bottom: .3rem; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
th + td, th + th, td + td, td + th { padding-left: .7rem; }
td, th { overflow-wrap: break-word; max-width: 26rem; }
td code, th code { overflow-wrap: break-word; }
tbody th { position: sticky; left: 0; background: var(--paper); }
thead th, thead td { border-bottom: 2px solid var(--line); }
tbody th { font-weight: 500; }
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
.numbers td { white-space: nowrap; }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 3px; }
figcaption { overflow-wrap: anywhere; line-height: 1.3; padding: .2rem 0 .4rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: .8rem 1.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr)); gap: .35rem; }
.sets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .6rem 1.2rem; }
.side { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .35rem; }
.strips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); gap: .6rem; }
.cells img { image-rendering: pixelated; }
.key { display: inline-block; width: 2.2em; height: .75em; margin-right: .4em; border-radius: 2px;
  vertical-align: baseline; }
@media (max-width: 30rem) { body { padding: .7rem; } tbody th { max-width: 9rem; }
  .tiles { grid-template-columns: repeat(4, 1fr); } h1 { font-size: 1.35rem; } }
@media print { :root { color-scheme: light; --ink: #000; --faint: #444; --paper: #fff; --card: #fff; --line: #bbb;
  --bad: #900; --badcard: #fff; --link: #000; }
  body { max-width: none; padding: 0; font-size: 9.5pt; } nav { display: none; }
  tbody th { position: static; } h2, h3, h4 { break-after: avoid; } figure, tr, .problem { break-inside: avoid; }
  .wide { overflow: visible; } .plots { grid-template-columns: repeat(2, 1fr); }
  .tiles { grid-template-columns: repeat(8, 1fr); } .sets { grid-template-columns: repeat(2, 1fr); }
  .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
