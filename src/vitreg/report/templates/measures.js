// ---- what is measured beside norms: a chart is [id, series, how it is drawn], where the page has a place for it
const perBlock = (key, of) => S[key].blocks.map((b) => of(b) ?? null);
const PLACES = [["stream", "residual|stream", "typical"], ["activations", "hidden|units", "high"], ["mlp", "MLP's|output", "registers"]];
const MEASURES = [
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
}
