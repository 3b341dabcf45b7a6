"""Style sheet and script of the profile's page, as text."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f9f9f7; --card: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --line: #e1e0d9;
  --roof: #383835; --good: #006300; --bad: #b02a2a; --warn: #fff3d6;
  --triton: #2a78d6; --eager: #8b8a84; --compile: #1baf7a; --flash: #eda100;
  --cudnn: #4a3aa7; --efficient: #e87ba4; --vendor: #eb6834; --other: #008300; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0d0d0d; --card: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --line: #2c2c2a;
  --roof: #c3c2b7; --good: #5fce5f; --bad: #f08a8a; --warn: #3a2d0c;
  --triton: #3987e5; --eager: #8b8a84; --compile: #199e70; --flash: #c98500;
  --cudnn: #9085e9; --efficient: #d55181; --vendor: #d95926; --other: #008300; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
header, main { max-width: 1160px; margin: auto; padding: 0 16px; }
header p { margin: 24px 0 0; color: var(--soft); }
h1 { margin: 0 0 8px; font-size: 26px; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 12px; font-size: 19px; } h3 { margin: 28px 0 8px; font-size: 16px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-bottom: 16px; }
a { color: inherit; }
section { margin: 0 0 16px; padding: 16px; background: var(--card);
  border: 1px solid var(--line); border-radius: 8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
dl + dl { margin-top: 12px; } dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.warn { padding: 6px 12px; background: var(--warn); border-radius: 6px; overflow-wrap: anywhere; }
.scroll { overflow: auto; margin: 8px 0; } .tall { max-height: 70vh; }
.wide { min-width: 640px; max-width: 960px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
th.n, td.n { text-align: right; } .win { color: var(--good); } .lose { color: var(--bad); }
td.lose:not(.n) { white-space: normal; min-width: 24ch; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr));
  gap: 12px 24px; }
figure { margin: 0; min-width: 0; } figcaption { color: var(--soft); font-size: 13px; }
svg { display: block; } .bars, .curves { width: 100%; max-width: 420px; }
.roofline { width: 100%; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .value { fill: var(--ink); } svg .name, svg .end { text-anchor: end; }
svg .middle { text-anchor: middle; } svg .roofname { fill: var(--ink); }
.grid { stroke: var(--line); fill: none; } .roof { stroke: var(--roof); stroke-width: 2; }
.curve { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.bar { fill: var(--c); } .mark { fill: var(--c); stroke: var(--card); stroke-width: 1; }
.target { fill: transparent; } .dot:hover .mark { stroke: var(--ink); stroke-width: 2; }
.triton { --c: var(--triton); } .eager { --c: var(--eager); } .compile { --c: var(--compile); }
.flash { --c: var(--flash); } .cudnn { --c: var(--cudnn); } .vendor { --c: var(--vendor); }
.efficient { --c: var(--efficient); } .other { --c: var(--other); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0 0 8px; padding: 0;
  list-style: none; font-size: 13px; }
.legend li { display: flex; align-items: center; gap: 6px; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
li { overflow-wrap: anywhere; }
"""

# A click on a column's title sorts by it, a second click reverses the order. Rows that were not
# measured stay at the end.
SCRIPT = """
for (const table of document.querySelectorAll("table.sort")) {
  const titles = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  titles.forEach((title, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const up = title.getAttribute("aria-sort") !== "ascending";
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[i].dataset.v ?? row.cells[i].textContent;
      const missing = (row) => row.cells[i].textContent === "\\u2013";
      const compare = (a, b) => missing(a) - missing(b) || (up ? 1 : -1) *
        (isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b));
      body.append(...[...body.rows].sort(compare));
    });
  });
}
"""
