const MODELS = [{ data: S.before, when: "before" }, { data: S.after, when: "after" }];

// The two series of what the summary holds as KEY_before and KEY_after.
const both = (key, label, dashed = false) => MODELS.map(({ when }) => ({ label: `${label}|${when}`, values: S.blocks.map((b) => b[`${key}_${when}`]), color: when, dashed }));
const known = (series) => series.filter((s) => s.values.some((v) => v !== null));

function drawCharts() {
  drawNorms();
  drawLines("depth", [...both("max", "largest"), ...both("median", "median", true)], { log: true, format: number, title: "norm" });
  if (byId("outliers")) drawLines("outliers", both("outlier_fraction", "outliers"), { log: false, format: percent, title: "share of patches" });
  if (byId("shares")) {
    const registers = both("attention_on_registers", "on registers", true).filter((_, m) => MODELS[m].data.model.num_registers);
    drawLines("shares", known([...both("attention_on_outliers", "on outliers"), ...registers]), { log: false, format: percent, title: "share of attention" });
  }
  if (byId("tokens")) drawLines("tokens", MODELS.flatMap(tokensOf), { log: true, format: number, title: "norm" });
}

function tokensOf({ data, when }) {
  const registers = (data.register_norms?.[0] ?? []).map((_, r, { length }) => ({
    label: `register ${r + 1}|${when}`,
    // One name for all of them at the end of the lines: they often lie close together.
    end: r ? "" : `register${length > 1 ? "s" : ""}|${when}`,
    values: data.register_norms.map((block) => block[r]),
    color: when,
  }));
  return data.cls_norms ? [...registers, { label: `class token|${when}`, values: data.cls_norms, color: when, dashed: true }] : registers;
}

function drawNorms() {
  const now = S.blocks[state.block];
  drawHistogram(MODELS.flatMap(({ data }) => data.blocks.map((b) => b.histogram)), (c, x, y) => {
    for (const { data, when } of MODELS) {
      const { edges, counts } = data.blocks[state.block].histogram;
      const height = (count) => (count ? y(count) : c.bottom).toFixed(1);
      const steps = counts.map((count, i) => `L${x(edges[i]).toFixed(1)} ${height(count)}H${x(edges[i + 1]).toFixed(1)}`).join("");
      svg(c.root, "path", { class: "bars", style: `color: var(--${when})`, d: `M${x(edges[0]).toFixed(1)} ${c.bottom}${steps}V${c.bottom}` });
    }
  });
  byId("histogram-says").textContent = now.threshold === null
    ? "No patch counts as an outlier after this block."
    : `After block ${state.block}, ${percent(now.outlier_fraction_before)} of patches reach the threshold of ${number(now.threshold)} before, ${percent(now.outlier_fraction_after)} after.`.replaceAll(" %", "\u00a0%");
}

// ---- one image: what a panel paints, and what it says of the patch pointed at or, without one, of the whole map
const KINDS = {
  photograph: { paint: (canvas, _, image) => paintPhoto(canvas, image), says: (_, at) => (at === null ? "" : patchName(at)) },
  norm: { paint: paintNorm, says: normSays },
  attention: { paint: paintAttention, says: attentionSays },
};
const PANELS = [
  { kind: "photograph", model: 0, name: "photograph" },
  ...["norm", "attention"].slice(0, M.queries.length ? 2 : 1).flatMap((kind) => MODELS.map(({ when }, model) => ({ kind, model, name: `${kind} ${when}` }))),
];

function normSays(layers, at, median) {
  const count = total(layers.outliers);
  if (at === null) return `up to ${number(largestNorm(layers))}, ${counted(count, "outlier")}`;
  const value = normAt(layers, at);
  return `${number(value)}, ${number(value / median)} × median${layers.outliers[at] ? ", outlier" : ""}`;
}

function attentionSays(layers, at) {
  if (at === null) return `up to ${percent(attentionAt(layers, layers.attention.indexOf(Math.max(...layers.attention))))}`;
  const share = attentionAt(layers, at);
  return `${percent(share)}, ${number(share * CELLS)} × even share`;
}

function drawExample(example) {
  const slot = slotOf(state.block), block = S.blocks[M.blocks[slot]], at = example.patch;
  const layers = MODELS.map((_, model) => layersOf(example.bytes, slot, model));
  const spoken = PANELS.map(({ kind, model, name }, i) => {
    const canvas = example.panels[i], { caption, absent } = example.beside[i], { when } = MODELS[model], of = layers[model];
    const missing = kind === "attention" && !of.attention;
    canvas.hidden = missing;
    absent.hidden = !missing;
    absent.textContent = missing ? `no ${M.queries[state.query]} ${when}` : "";
    caption.textContent = missing ? "" : KINDS[kind].says(of, at, block[`median_${when}`]);
    caption.classList.toggle("pointed", at !== null);
    if (!missing) {
      const pen = KINDS[kind].paint(canvas, of, example.image);
      outline(pen, of.outliers);
      if (at !== null) markPatch(pen, at);
    }
    return `${name}: ${caption.textContent || absent.textContent}`;
  });
  example.spoken.textContent = at === null ? "" : spoken.join("; ");
}

function addExample(image, bytes) {
  const panels = canvasesOf(image.name, PANELS.map((p) => p.name)), spoken = node("p", { className: "spoken", ariaLive: "polite" });
  const beside = panels.map(() => ({ caption: node("figcaption"), absent: node("p", { className: "absent", hidden: true }) }));
  const figures = panels.map((canvas, i) => node("figure", {}, canvas, beside[i].absent, beside[i].caption));
  beside.forEach(({ caption, absent }, i) => {
    caption.dataset.name = i ? PANELS[i].name : "";
    absent.style.aspectRatio = S.image_size.toReversed().join(" / ");
  });
  return addCard(image, { bytes, panels, beside, spoken }, node("h3", {}, ...breakable(image.name)), spoken, node("div", { className: "panels" }, ...figures));
}

document.documentElement.style.setProperty("--panels", PANELS.length);
start({ charts: drawCharts, card: addExample, image: drawExample });
