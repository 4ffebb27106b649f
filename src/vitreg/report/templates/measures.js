// ---- what is measured beside norms: a chart is [id, series, how it is drawn], where the page has a place for it
const perBlock = (key, of) => S[key].blocks.map((b) => of(b) ?? null);
const PLACES = [["stream", "residual|stream", "typical"], ["activations", "hidden|units", "high"], ["mlp", "MLP's|output", "registers"]];
const MEASURES = [
  ["faithfulness", () => [
    { label: "cosine,|patches alone", color: "typical", values: perBlock("faithfulness", (b) => b.cosine) },
    { label: "to itself", color: "high", values: perBlock("faithfulness", (b) => b.to_cls) },
    { label: "to registers", color: "registers", values: perBlock("faithfulness", (b) => (S.model.num_registers ? b.to_registers : null)) },
  ], { log: false, format: percent, title: "share of attention, and cosine" }],
  ["sinks", () => [["no-op", "typical"], ["broadcast", "high"], ["other", "peak"]].map(([kind, color]) => ({
    label: kind, color, values: S.sinks.blocks.map((b) => b[kind] / S.sinks.num_heads),
  })), { log: false, format: percent, title: "share of heads" }],
  ["ranges", () => [
    ...PLACES.map(([place, label, color]) => ({ label, color, values: perBlock("ranges", (b) => b[place]?.largest) })),
    { label: "float16's|limit", color: "peak", dashed: true, values: perBlock("ranges", () => 65504) },
  ], { log: true, format: number, title: "magnitude" }],
  ["int8", () => [["stream", "stream", "typical"], ["activations", "units", "high"]].flatMap(([place, label, color]) => [
    { label: `${label},|one step`, color, values: perBlock("ranges", (b) => b[place]?.int8_per_tensor) },
    { label: `${label},|per channel`, color, dashed: true, end: "", values: perBlock("ranges", (b) => b[place]?.int8_per_channel) },
  ]), { log: false, format: percent, title: "share of a token's norm" }],
];

function drawMeasures() {
  for (const [id, series, how] of MEASURES) {
    if (byId(id)) drawLines(id, series().filter(({ values }) => values.some((v) => v !== null)), how);
  }
  if (!byId("attention-says")) return;
  const { to_patches: shown, cosine } = S.faithfulness.blocks[state.block];
  byId("attention-says").textContent = `In this block the class token's map shows ${percent(shown)} of its attention; what it would read from these patches alone has a cosine of ${number(cosine)} with what it reads.`;
}
