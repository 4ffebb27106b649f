"use strict";
// One number drives the page: the block under the slider. `show` draws everything for it.
const { summary: S, maps: M, colours } = JSON.parse(document.getElementById("data").textContent);
const [ROWS, COLUMNS] = S.grid;
const CELLS = ROWS * COLUMNS;
const byId = (id) => document.getElementById(id);
const state = { block: S.block, query: 0 };
const rgb = Object.fromEntries(Object.entries(colours).map(([name, hex]) => [name, hex.match(/../g).map((h) => parseInt(h, 16))]));

// ---- numbers in words
const number = (v) => (v === null || v === undefined ? "–" : v >= 100 ? v.toFixed(0) : v >= 10 ? v.toFixed(1) : v.toFixed(2));
const percent = (v) => {
  if (v === null || v === undefined) return "–";
  return v === 0 || v >= 0.9995 ? `${Math.round(100 * v)} %` : `${(100 * v).toFixed(v < 0.001 ? 3 : v < 0.01 ? 2 : 1)} %`;
};
const tick = (v) => `${+v.toPrecision(3)}`;
const tickPercent = (v) => `${tick(100 * v)} %`;
const decode = ([low, high], code) => low * (high / low) ** (code / 255);

function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// ---- charts: small SVGs, drawn anew at the width they have, so that text keeps its size on a phone
function svg(parent, tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function canvasFor(host, label, right) {
  const width = host.clientWidth, height = 240;
  host.replaceChildren();
  const root = svg(host, "svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  return { root, left: 44, right: width - right, top: 18, bottom: height - 38 };
}

const linear = (a, b, from, to) => (v) => from + ((v - a) / (b - a || 1)) * (to - from);
const logarithmic = (a, b, from, to) => { const f = linear(Math.log(a), Math.log(b), from, to); return (v) => f(Math.log(Math.max(v, a))); };

function logTicks(low, high) {
  const ticks = [];
  const steps = high / low > 5 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const m of steps) ticks.push(m * 10 ** e);
  const inside = ticks.filter((t) => t >= low && t <= high);
  return inside.length <= 7 ? inside : inside.filter((t) => Math.abs(Math.log10(t) - Math.round(Math.log10(t))) < 1e-6);
}

function linearTicks(high) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5].map((s) => [s, s / 10, s / 100]).flat().sort((a, b) => a - b).find((s) => high / s <= 5) || 1;
  return Array.from({ length: Math.floor(high / step + 1e-9) + 1 }, (_, i) => i * step);
}

function yAxis(c, scale, ticks, format, title) {
  for (const t of ticks) {
    svg(c.root, "line", { class: "grid", x1: c.left, x2: c.right, y1: scale(t), y2: scale(t) });
    svg(c.root, "text", { x: c.left - 6, y: scale(t) + 4, "text-anchor": "end" }, format(t));
  }
  svg(c.root, "text", { x: 0, y: 9 }, title);
}

function xAxis(c, scale, ticks, title) {
  svg(c.root, "line", { class: "axis", x1: c.left, x2: c.right, y1: c.bottom, y2: c.bottom });
  for (const t of ticks) svg(c.root, "text", { x: scale(t), y: c.bottom + 16, "text-anchor": "middle" }, tick(t));
  svg(c.root, "text", { x: (c.left + c.right) / 2, y: c.bottom + 33, "text-anchor": "middle" }, title);
}

function drawHistogram() {
  const block = S.blocks[state.block], { edges, counts } = block.histogram;
  const c = canvasFor(byId("histogram"), `Histogram of patch norms after block ${state.block}`, 8);
  const all = S.blocks.flatMap((b) => [b.histogram.edges[0], b.histogram.edges.at(-1), b.threshold ?? b.max]);
  const low = Math.max(Math.min(...all), 1e-6), high = Math.max(...all);
  const most = Math.max(...S.blocks.flatMap((b) => b.histogram.counts), 1);
  const x = logarithmic(low, high, c.left, c.right), y = logarithmic(0.5, most * 1.3, c.bottom, c.top);
  yAxis(c, y, logTicks(1, most), (t) => t.toLocaleString("en"), "patches (log scale)");
  counts.forEach((count, i) => {
    if (!count) return;
    const from = x(edges[i]), to = x(edges[i + 1]);
    const outlier = block.threshold !== null && Math.sqrt(edges[i] * edges[i + 1]) >= block.threshold;
    const box = { x: from, y: y(count), width: Math.max(to - from - 0.5, 1), height: c.bottom - y(count) };
    svg(c.root, "rect", { class: outlier ? "bar-outlier" : "bar-typical", ...box });
  });
  xAxis(c, x, logTicks(low, high), "norm (log scale)");
  let says = "No patch counts as an outlier after this block.";
  if (block.threshold !== null) {
    const at = x(block.threshold), flip = at > (c.left + c.right) / 2;
    svg(c.root, "line", { class: "threshold", x1: at, x2: at, y1: c.top, y2: c.bottom });
    svg(c.root, "text", { x: at + (flip ? -6 : 6), y: c.top + 8, "text-anchor": flip ? "end" : "start" }, `threshold ${number(block.threshold)}`);
    says = `After block ${state.block}, ${percent(block.outlier_fraction)} of patches reach the threshold of ${number(block.threshold)}.`;
  }
  byId("histogram-says").textContent = says;
}

// series: {label, values, colour}; "|" breaks a label. Every series is named at its end, and its value is in the caption.
function drawLines(id, series, { log, format, title }) {
  const host = byId(id), narrow = host.clientWidth < 300;
  const c = canvasFor(host, `${title} over blocks: ${series.map((s) => s.label.replace("|", " ")).join(", ")}`, narrow ? 12 : 88);
  const values = series.flatMap((s) => s.values).filter((v) => v !== null && (!log || v > 0));
  const low = log ? Math.min(...values) / 1.1 : 0, high = log ? Math.max(...values) * 1.1 : Math.max(...values, 0.01) * 1.05;
  const last = S.blocks.length - 1;
  const x = linear(0, last, c.left + 8, c.right - 8), y = (log ? logarithmic : linear)(low, high, c.bottom, c.top);
  yAxis(c, y, log ? logTicks(low, high) : linearTicks(high), log ? tick : tickPercent, title + (log ? " (log scale)" : ""));
  const every = [1, 2, 4, 5, 10, 20, 50].find((s) => (last / s) * 26 < c.right - c.left) || 100;
  xAxis(c, x, S.blocks.map((b) => b.block).filter((k) => k % every === 0), "block");
  svg(c.root, "line", { class: "now", x1: x(state.block), x2: x(state.block), y1: c.top, y2: c.bottom });
  if (S.onset_block !== null) {
    const at = x(S.onset_block), flip = S.onset_block > last / 2;
    svg(c.root, "line", { class: "onset", x1: at, x2: at, y1: c.top, y2: c.bottom });
    svg(c.root, "text", { x: at + (flip ? -5 : 5), y: c.top + 8, "text-anchor": flip ? "end" : "start" }, `onset: block ${S.onset_block}`);
  }
  const labels = [];
  for (const { label, values, colour } of series) {
    const group = svg(c.root, "g", { style: `color: var(--${colour})` });
    const points = values.map((v, k) => (v === null ? null : [x(k), y(v)]));
    const path = points.map((p, k) => (p ? `${k && points[k - 1] ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}` : "")).join("");
    svg(group, "path", { class: "series", d: path });
    const now = points[state.block], end = points.findLast(Boolean);
    if (now) svg(group, "circle", { class: "dot", cx: now[0], cy: now[1], r: 4 });
    if (end && !narrow) labels.push({ group, lines: label.split("|"), y: end[1] });
  }
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((l, i) => { const above = labels[i - 1]; if (above) l.y = Math.max(l.y, above.y + 14 * above.lines.length); });
  let floor = c.bottom + 4;
  for (const l of labels.toReversed()) { floor -= 14 * (l.lines.length - 1); l.y = Math.min(l.y, floor); floor = l.y - 14; }
  for (const l of labels) l.lines.forEach((line, i) => svg(l.group, "text", { class: "label", x: c.right + 2, y: l.y + 4 + 14 * i }, line));
  byId(`${id}-says`).replaceChildren(`After block ${state.block}: `, ...series.map((s) => {
    const swatch = node("span", { className: "swatch" });
    swatch.style.background = `var(--${s.colour})`;
    return node("span", { className: "reading" }, swatch, s.label.replace("|", " "), " ", node("b", {}, format(s.values[state.block])));
  }));
  host.onclick = (event) => show(Math.round(linear(x(0), x(last), 0, last)(event.clientX - host.getBoundingClientRect().left)));
}

function drawCharts() {
  const over = (key) => S.blocks.map((b) => b[key]);
  drawHistogram();
  drawLines("depth", [
    { label: "maximum", values: over("max"), colour: "peak" },
    { label: "99th|percentile", values: over("p99"), colour: "high" },
    { label: "median", values: over("median"), colour: "typical" },
  ], { log: true, format: number, title: "norm" });
  const shares = [
    { label: "outlier|patches", values: over("outlier_fraction"), colour: "peak" },
    { label: "attention|on outliers", values: over("attention_on_outliers"), colour: "high" },
  ];
  if (S.model.num_registers) shares.push({ label: "attention|on registers", values: over("attention_on_registers"), colour: "registers" });
  if (byId("shares")) drawLines("shares", shares.filter((s) => s.values.some((v) => v !== null)), { log: false, format: percent, title: "share" });
  if (!byId("tokens")) return;
  const tokens = [{ label: "median|patch", values: over("median"), colour: "typical" }];
  if (S.cls_norms) tokens.push({ label: "class token", values: S.cls_norms, colour: "high" });
  (S.register_norms?.[0] ?? []).forEach((_, r) => tokens.push({ label: `register ${r + 1}`, values: S.register_norms.map((b) => b[r]), colour: "registers" }));
  drawLines("tokens", tokens, { log: true, format: number, title: "norm" });
}

// ---- maps
const tile = new OffscreenCanvas(COLUMNS, ROWS);

function paint(canvas, colourOf) {
  const pen = fit(canvas), picture = new ImageData(COLUMNS, ROWS);
  for (let i = 0; i < CELLS; i++) picture.data.set([...colourOf(i), 255], 4 * i);
  tile.getContext("2d").putImageData(picture, 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(tile, 0, 0, canvas.width, canvas.height);
  return pen;
}

function fit(canvas) {
  const width = Math.round(canvas.clientWidth * devicePixelRatio);
  const height = Math.round((width * S.image_size[0]) / S.image_size[1]);
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  return canvas.getContext("2d");
}

const colourAt = (name, code) => { const c = 3 * Math.max(0, Math.min(255, Math.round(code))); return rgb[name].slice(c, c + 3); };

function scaleBar(host, title, name, ends, mark) {
  const stops = Array.from({ length: 17 }, (_, i) => `rgb(${colourAt(name, i * 16 - (i === 16))})`);
  const ramp = node("div", { className: "ramp" });
  ramp.style.background = `linear-gradient(90deg, ${stops})`;
  if (mark !== undefined && mark >= 0 && mark <= 1) ramp.append(node("i", { style: `left: ${100 * mark}%` }));
  host.replaceChildren(...(title ? [node("div", { className: "title" }, title)] : []), ramp, node("div", { className: "ends" }, ...ends.map((e) => node("span", {}, e))));
}

function outline(pen, bits) {
  const w = pen.canvas.width / COLUMNS, h = pen.canvas.height / ROWS;
  const out = (r, c) => r >= 0 && r < ROWS && c >= 0 && c < COLUMNS && bits[r * COLUMNS + c];
  pen.beginPath();
  const edge = (x1, y1, x2, y2) => { pen.moveTo(x1 * w, y1 * h); pen.lineTo(x2 * w, y2 * h); };
  for (let r = 0; r < ROWS; r++) for (let c = 0; c < COLUMNS; c++) {
    if (!out(r, c)) continue;
    if (!out(r - 1, c)) edge(c, r, c + 1, r);
    if (!out(r + 1, c)) edge(c, r + 1, c + 1, r + 1);
    if (!out(r, c - 1)) edge(c, r, c, r + 1);
    if (!out(r, c + 1)) edge(c + 1, r, c + 1, r + 1);
  }
  stroke(pen, 1.5, "#ff5a3c");
}

// Two strokes, dark under light, show on any picture.
function stroke(pen, width, colour) {
  for (const [extra, style] of [[2, "#000a"], [0, colour]]) {
    pen.lineWidth = (width + extra) * devicePixelRatio;
    pen.strokeStyle = style;
    pen.stroke();
  }
}

function drawPosition() {
  const canvas = byId("position");
  if (!canvas) return;
  const cells = S.position_frequency.flat(), most = Math.max(...cells);
  paint(canvas, (i) => colourAt("magma", (255 * cells[i]) / (most || 1)));
  scaleBar(byId("position-scale"), "", "magma", [0, most / 2, most].map(tickPercent));
  const best = cells.indexOf(most);
  const say = (i) => { byId("position-says").textContent = `Row ${Math.floor(i / COLUMNS)}, column ${i % COLUMNS}: ${percent(cells[i])} of images.`; };
  say(best);
  canvas.onpointermove = canvas.onpointerdown = (event) => say(patchUnder(event));
  canvas.onpointerleave = () => say(best);
}

// ---- images
const examples = [];

async function unpack(text) {
  const zipped = new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]);
  return new Uint8Array(await new Response(zipped.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
}

// Where a block's maps lie in the bytes: norm, then one map a query, then the outlier bits.
function layersOf(example, slot) {
  const size = CELLS * (1 + M.queries.length) + Math.ceil(CELLS / 8);
  const bytes = example.bytes.subarray(slot * size, (slot + 1) * size);
  const bits = bytes.subarray(CELLS * (1 + M.queries.length));
  const outliers = Array.from({ length: CELLS }, (_, i) => (bits[i >> 3] >> (7 - (i & 7))) & 1);
  const from = CELLS * (1 + state.query);
  return { norm: bytes.subarray(0, CELLS), attention: bytes.subarray(from, from + CELLS), outliers };
}

// Large reports keep the maps of some blocks only; the nearest of them stands in.
const slotOf = (block) => M.blocks.reduce((best, k, i) => (Math.abs(k - block) < Math.abs(M.blocks[best] - block) ? i : best), 0);

function patchUnder(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const clamp = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v * n)));
  return clamp((event.clientY - box.top) / box.height, ROWS) * COLUMNS + clamp((event.clientX - box.left) / box.width, COLUMNS);
}

function drawExample(example) {
  const slot = slotOf(state.block), layers = layersOf(example, slot), median = S.blocks[M.blocks[slot]].median;
  const pens = [fit(example.panels[0])];
  pens[0].drawImage(example.image, 0, 0, pens[0].canvas.width, pens[0].canvas.height);
  pens.push(paint(example.panels[1], (i) => colourAt("viridis", layers.norm[i])));
  // The root of the attention: linear shows a few patches on black, logarithmic makes them drown in the rest.
  const range = M.attention_range[state.query]?.[slot], rooted = Array.from({ length: 256 }, (_, c) => range && 255 * Math.sqrt(decode(range, c) / range[1]));
  if (range) pens.push(paint(example.panels[2], (i) => colourAt("magma", rooted[layers.attention[i]])));
  for (const pen of pens) outline(pen, layers.outliers);
  const normAt = (i) => decode(M.norm_range[slot], layers.norm[i]);
  const count = layers.outliers.reduce((a, b) => a + b, 0), top = layers.norm.indexOf(Math.max(...layers.norm));
  example.sum.textContent = `Largest norm ${number(normAt(top))}, ${number(normAt(top) / median)} × the median; ${count || "no"} outlier${count === 1 ? "" : "s"} in ${CELLS} patches.`;
  const at = example.patch;
  if (at === null) return example.readout.replaceChildren();
  const row = Math.floor(at / COLUMNS), column = at % COLUMNS;
  for (const pen of pens) {
    const w = pen.canvas.width / COLUMNS, h = pen.canvas.height / ROWS;
    pen.beginPath();
    pen.rect(column * w, row * h, w, h);
    stroke(pen, 2, "#fff");
  }
  const lines = [`Row ${row}, column ${column}`, `Norm ${number(normAt(at))}, ${number(normAt(at) / median)} × the median${layers.outliers[at] ? " (outlier)" : ""}`];
  if (range) {
    const value = decode(range, layers.attention[at]);
    lines.push(`Attention ${percent(value)}, ${number(value * CELLS)} × the even share`);
  }
  example.readout.replaceChildren(...lines.map((line) => node("span", {}, line)));
}

// A line may end after a separator of a file name, rather than in the middle of a word.
const breakable = (name) => name.split(/(?<=[-_/\\])/).flatMap((part) => [part, node("wbr")]);

function addExample({ name, photo }, bytes) {
  const captions = ["photograph", "patch norm", ...(M.queries.length ? ["attention"] : [])];
  const panels = captions.map((what) => node("canvas", { role: "img", ariaLabel: `${what} of ${name}` }));
  const example = { bytes, panels, patch: null, image: node("img", { src: photo }), sum: node("p"), readout: node("p", { className: "readout", ariaLive: "polite" }) };
  const about = node("div", { className: "about" }, node("h3", {}, ...breakable(name)), example.sum, example.readout);
  const card = node("article", { className: "example", tabIndex: 0, ariaLabel: name }, about, node("div", { className: "panels" }, ...panels.map((p) => node("figure", {}, p))));
  const point = (patch) => { if (patch !== example.patch) { example.patch = patch; drawExample(example); } };
  for (const panel of panels) {
    panel.onpointerdown = panel.onpointermove = (event) => point(patchUnder(event));
    panel.onpointerleave = (event) => { if (event.pointerType === "mouse") point(null); };
  }
  card.onkeydown = (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") point(null);
    if (!step) return;
    event.preventDefault();
    const [row, column] = example.patch === null ? [0, 0] : [Math.floor(example.patch / COLUMNS) + step[0], (example.patch % COLUMNS) + step[1]];
    point(Math.max(0, Math.min(ROWS - 1, row)) * COLUMNS + Math.max(0, Math.min(COLUMNS - 1, column)));
  };
  examples.push(example);
  byId("examples").append(card);
  return example.image.decode();
}

function drawImages() {
  if (!examples.length) return;
  const slot = slotOf(state.block), kept = M.blocks[slot], threshold = S.blocks[kept].threshold;
  const [low, high] = M.norm_range[slot];
  const mark = threshold === null ? undefined : Math.log(threshold / low) / Math.log(high / low);
  scaleBar(byId("norm-scale"), `Patch norm, block ${kept}${threshold === null ? "" : `; outlier ≥ ${number(threshold)}`}`, "viridis", [low, Math.sqrt(low * high), high].map(number), mark);
  if (M.queries.length) {
    const most = M.attention_range[state.query][slot][1];
    scaleBar(byId("attention-scale"), "", "magma", [0, most / 4, most].map(tickPercent));
  }
  byId("thinned").textContent = kept === state.block ? "" : `To keep this file small it holds the maps of some blocks only; these are of block ${kept}, the nearest.`;
  examples.forEach(drawExample);
}

// ---- the page
function show(block) {
  state.block = Math.max(0, Math.min(S.blocks.length - 1, block));
  byId("block").value = state.block;
  byId("block-now").textContent = `${state.block} of 0..${S.blocks.length - 1}${state.block === S.block ? " (reported)" : state.block === S.onset_block ? " (onset)" : ""}`;
  for (const row of document.querySelectorAll("tr[data-block]")) row.toggleAttribute("aria-current", +row.dataset.block === state.block);
  drawCharts();
  drawImages();
}

function redraw() {
  document.documentElement.style.setProperty("--bar", `${byId("bar").offsetHeight}px`);
  drawPosition();
  show(+byId("block").value);
}

let waiting = null;
function soon() {
  waiting ??= requestAnimationFrame(() => { waiting = null; redraw(); });
}

async function start() {
  byId("block").addEventListener("input", soon);
  byId("query")?.addEventListener("change", (event) => { state.query = +event.target.value; drawImages(); });
  document.documentElement.style.setProperty("--panels", M.queries.length ? 3 : 2);
  addEventListener("resize", soon);
  soon();
  const bytes = await Promise.all(M.examples.map((example) => unpack(example.maps)));
  await Promise.all(M.examples.map((example, i) => addExample(example, bytes[i])));
  redraw();
  document.documentElement.dataset.ready = "yes";
}
start().catch((error) => {
  byId("trouble").hidden = false;
  byId("trouble").textContent = `The maps could not be drawn (${error.message}). This page needs a browser of 2023 or later.`;
});
