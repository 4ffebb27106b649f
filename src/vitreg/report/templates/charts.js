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

// Axes that hold `histograms`, those of every block, so that they stand still while the slider moves; the page adds its bars.
function drawHistogram(histograms, bars) {
  const { threshold } = S.blocks[state.block];
  const c = canvasFor(byId("histogram"), `Histogram of patch norms after block ${state.block}`, 8);
  const ends = [...histograms.flatMap(({ edges }) => [edges[0], edges.at(-1)]), ...S.blocks.flatMap((b) => b.threshold ?? [])];
  const low = Math.max(Math.min(...ends), 1e-6), high = Math.max(...ends), most = Math.max(...histograms.flatMap((h) => h.counts), 1);
  const x = logarithmic(low, high, c.left, c.right), y = logarithmic(0.5, most * 1.3, c.bottom, c.top);
  yAxis(c, y, logTicks(1, most), (t) => t.toLocaleString("en"), "patches (log scale)");
  bars(c, x, y);
  xAxis(c, x, logTicks(low, high), "norm (log scale)");
  if (threshold === null) return;
  const at = x(threshold), flip = at > (c.left + c.right) / 2;
  svg(c.root, "line", { class: "threshold", x1: at, x2: at, y1: c.top, y2: c.bottom });
  svg(c.root, "text", { x: at + (flip ? -6 : 6), y: c.top + 8, "text-anchor": flip ? "end" : "start" }, `threshold ${number(threshold)}`);
}

// series: {label, values, color, dashed, end}; "|" breaks a label. A series is named at its end, unless `end` is
// another name or "", and its value is in the caption.
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
  if (ONSET !== null) {
    const at = x(ONSET), flip = ONSET > last / 2;
    svg(c.root, "line", { class: "onset", x1: at, x2: at, y1: c.top, y2: c.bottom });
    svg(c.root, "text", { x: at + (flip ? -5 : 5), y: c.top + 8, "text-anchor": flip ? "end" : "start" }, `onset: block ${ONSET}`);
  }
  const labels = [];
  for (const { label, values, color, dashed, end: name = label } of series) {
    const group = svg(c.root, "g", { style: `color: var(--${color})` });
    const points = values.map((v, k) => (v === null ? null : [x(k), y(v)]));
    const path = points.map((p, k) => (p ? `${k && points[k - 1] ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}` : "")).join("");
    svg(group, "path", { class: dashed ? "series dashed" : "series", d: path });
    const now = points[state.block], end = points.findLast(Boolean);
    if (now) svg(group, "circle", { class: "dot", cx: now[0], cy: now[1], r: 4 });
    if (end && name && !narrow) labels.push({ group, lines: name.split("|"), y: end[1] });
  }
  labels.sort((a, b) => a.y - b.y);
  labels.forEach((l, i) => { const above = labels[i - 1]; if (above) l.y = Math.max(l.y, above.y + 14 * above.lines.length); });
  // Above the axis, whose last number would run into them.
  let floor = c.bottom - 5;
  for (const l of labels.toReversed()) { floor -= 14 * (l.lines.length - 1); l.y = Math.min(l.y, floor); floor = l.y - 14; }
  for (const l of labels) l.lines.forEach((line, i) => svg(l.group, "text", { class: "label", x: c.right + 2, y: l.y + 4 + 14 * i }, line));
  byId(`${id}-says`).replaceChildren(`After block ${state.block}: `, ...series.map((s) => {
    const swatch = node("span", { className: s.dashed ? "swatch dashed" : "swatch" });
    swatch.style.setProperty("--of", `var(--${s.color})`);
    return node("span", { className: "reading" }, swatch, s.label.replace("|", " "), " ", node("b", {}, format(s.values[state.block])));
  }));
  host.onclick = (event) => show(Math.round(linear(x(0), x(last), 0, last)(event.clientX - host.getBoundingClientRect().left)));
}
