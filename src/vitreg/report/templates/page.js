"use strict";
// One number drives the page: the block under the slider. `show` draws everything for it.
const { summary: S, maps: M, colors, onset: ONSET } = JSON.parse(document.getElementById("data").textContent);
const [ROWS, COLUMNS] = S.grid;
const CELLS = ROWS * COLUMNS;
const byId = (id) => document.getElementById(id);
const state = { block: S.block, query: 0 };
const rgb = Object.fromEntries(Object.entries(colors).map(([name, hex]) => [name, hex.match(/../g).map((h) => parseInt(h, 16))]));

// ---- numbers in words, as words.py has them; a line may not end before a unit
const number = (v) => (v == null ? "–" : v.toFixed(Math.abs(v) >= 99.95 ? 0 : Math.abs(v) >= 9.995 ? 1 : 2));
const percent = (v) => {
  if (v == null) return "–";
  if (v === 0 || v === 1) return `${100 * v}\u00a0%`;
  if (v > 0 && v < 5e-6) return "<0.001\u00a0%";
  if (v >= 0.9995 && v < 1) return ">99.9\u00a0%";
  return `${(100 * v).toFixed(v < 0.000995 ? 3 : v < 0.00995 ? 2 : 1)}\u00a0%`;
};
const counted = (count, noun) => `${count || "no"} ${noun}${count === 1 ? "" : noun.endsWith("ch") ? "es" : "s"}`;
const tick = (v) => `${+v.toPrecision(3)}`;
const tickPercent = (v) => `${tick(100 * v)}\u00a0%`;
const decode = ([low, high], code) => low * (high / low) ** (code / 255);

function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// ---- the page
const draw = {};

// What differs between pages: `fixed` is drawn once per width, `charts` and `image` for every block; `card` adds an image.
function start(parts) {
  Object.assign(draw, parts);
  begin().catch((error) => {
    byId("trouble").hidden = false;
    byId("trouble").textContent = `The maps could not be drawn (${error.message}). This page needs a browser of 2023 or later.`;
  });
}

async function begin() {
  byId("block").addEventListener("input", soon);
  byId("query")?.addEventListener("change", (event) => { state.query = +event.target.value; drawImages(); });
  addEventListener("resize", soon);
  soon();
  const bytes = await Promise.all(M.examples.map((example) => unpack(example.maps)));
  await Promise.all(M.examples.map((example, i) => draw.card(example, bytes[i])));
  redraw();
  document.documentElement.dataset.ready = "yes";
}

let waiting = null;
function soon() {
  waiting ??= requestAnimationFrame(() => { waiting = null; redraw(); });
}

function redraw() {
  document.documentElement.style.setProperty("--bar", `${byId("bar").offsetHeight}px`);
  draw.fixed?.();
  show(+byId("block").value);
}

function show(block) {
  state.block = Math.max(0, Math.min(S.blocks.length - 1, block));
  byId("block").value = state.block;
  byId("block-now").textContent = `${state.block} of 0..${S.blocks.length - 1}${state.block === S.block ? " (reported)" : state.block === ONSET ? " (onset)" : ""}`;
  for (const row of document.querySelectorAll("tr[data-block]")) row.toggleAttribute("aria-current", +row.dataset.block === state.block);
  draw.charts();
  drawImages();
}
