function drawCharts() {
  const over = (key) => S.blocks.map((b) => b[key]);
  drawNorms();
  drawLines("depth", [
    { label: "maximum", values: over("max"), color: "peak" },
    { label: "99th|percentile", values: over("p99"), color: "high" },
    { label: "median", values: over("median"), color: "typical" },
  ], { log: true, format: number, title: "norm" });
  const shares = [
    { label: "outlier|patches", values: over("outlier_fraction"), color: "peak" },
    { label: "attention|on outliers", values: over("attention_on_outliers"), color: "high" },
  ];
  if (S.model.num_registers) shares.push({ label: "attention|on registers", values: over("attention_on_registers"), color: "registers" });
  if (byId("shares")) drawLines("shares", shares.filter((s) => s.values.some((v) => v !== null)), { log: false, format: percent, title: "share" });
  drawMeasures();
  if (!byId("tokens")) return;
  const tokens = [{ label: "median|patch", values: over("median"), color: "typical" }];
  if (S.cls_norms) tokens.push({ label: "class token", values: S.cls_norms, color: "high" });
  const summary = S.model.num_summary_tokens ?? 0;
  (S.register_norms?.[0] ?? []).forEach((_, r) => tokens.push({ label: `${r < summary ? "summary token" : "register"} ${r + 1}`, values: S.register_norms.map((b) => b[r]), color: "registers" }));
  drawLines("tokens", tokens, { log: true, format: number, title: "norm" });
}

function drawNorms() {
  const { threshold, outlier_fraction: share, histogram: { edges, counts } } = S.blocks[state.block];
  drawHistogram(S.blocks.map((b) => b.histogram), (c, x, y) => counts.forEach((count, i) => {
    if (!count) return;
    const from = x(edges[i]), to = x(edges[i + 1]);
    const outlier = threshold !== null && Math.sqrt(edges[i] * edges[i + 1]) >= threshold;
    const box = { x: from, y: y(count), width: Math.max(to - from - 0.5, 1), height: c.bottom - y(count) };
    svg(c.root, "rect", { class: outlier ? "bar-outlier" : "bar-typical", ...box });
  }));
  byId("histogram-says").textContent = threshold === null
    ? S.has_artifacts === null ? "There are too few patches to tell outliers from the rest." : "No patch counts as an outlier after this block."
    : `After block ${state.block}, ${percent(share)} of patches reach the threshold of ${number(threshold)}.`;
}

function drawPosition() {
  const canvas = byId("position");
  if (!canvas) return;
  const cells = S.position_frequency.flat(), most = Math.max(...cells);
  paint(canvas, (i) => colorAt("magma", (255 * cells[i]) / (most || 1)));
  scaleBar(byId("position-scale"), "", "magma", [0, most / 2, most].map(percent));
  const best = cells.indexOf(most);
  const say = (i) => { byId("position-says").textContent = `${patchName(i)}: ${percent(cells[i])} of images.`; };
  say(best);
  canvas.onpointermove = canvas.onpointerdown = (event) => say(patchUnder(event));
  canvas.onpointerleave = () => say(best);
}

function drawExample(example) {
  const slot = slotOf(state.block), { median } = S.blocks[M.blocks[slot]], layers = layersOf(example.bytes, slot, 0);
  const [photo, norm, attention] = example.panels;
  const pens = [paintPhoto(photo, example.image), paintNorm(norm, layers)];
  if (attention) pens.push(paintAttention(attention, layers));
  for (const pen of pens) outline(pen, layers.outliers);
  const largest = largestNorm(layers), count = total(layers.outliers);
  const found = S.has_artifacts === null ? "" : `; ${counted(count, "outlier")} in ${counted(CELLS, "patch")}`;
  example.sum.textContent = `Largest norm ${number(largest)}, ${number(largest / median)} × the median${found}.`;
  const at = example.patch;
  if (at === null) return example.readout.replaceChildren();
  for (const pen of pens) markPatch(pen, at);
  const value = normAt(layers, at);
  const lines = [patchName(at), `Norm ${number(value)}, ${number(value / median)} × the median${layers.outliers[at] ? " (outlier)" : ""}`];
  if (attention) {
    const share = attentionAt(layers, at);
    lines.push(`Attention ${percent(share)}, ${number(share * CELLS)} × the even share`);
  }
  example.readout.replaceChildren(...lines.map((line) => node("span", {}, line)));
}

function addExample(image, bytes) {
  const panels = canvasesOf(image.name, ["photograph", "patch norm", ...(M.queries.length ? ["attention"] : [])]);
  const sum = node("p"), readout = node("p", { className: "readout", ariaLive: "polite" });
  const about = node("div", { className: "about" }, node("h3", {}, ...breakable(image.name)), sum, readout);
  return addCard(image, { bytes, panels, sum, readout }, about, node("div", { className: "panels" }, ...panels.map((p) => node("figure", {}, p))));
}

document.documentElement.style.setProperty("--panels", M.queries.length ? 3 : 2);
start({ fixed: drawPosition, charts: drawCharts, card: addExample, image: drawExample });
