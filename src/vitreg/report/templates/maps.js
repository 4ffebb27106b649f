// ---- maps
const tile = new OffscreenCanvas(COLUMNS, ROWS);

function paint(canvas, colorOf) {
  const pen = fit(canvas), image = new ImageData(COLUMNS, ROWS);
  for (let i = 0; i < CELLS; i++) image.data.set([...colorOf(i), 255], 4 * i);
  tile.getContext("2d").putImageData(image, 0, 0);
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

const colorAt = (name, code) => { const c = 3 * Math.max(0, Math.min(255, Math.round(code))); return rgb[name].slice(c, c + 3); };

function scaleBar(host, title, name, ends, mark) {
  const stops = Array.from({ length: 17 }, (_, i) => `rgb(${colorAt(name, i * 16 - (i === 16))})`);
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

// Two strokes, dark under light, show on any image.
function stroke(pen, width, color) {
  for (const [extra, style] of [[2, "#000a"], [0, color]]) {
    pen.lineWidth = (width + extra) * devicePixelRatio;
    pen.strokeStyle = style;
    pen.stroke();
  }
}

// ---- images
const examples = [];

async function unpack(text) {
  const zipped = new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]);
  return new Uint8Array(await new Response(zipped.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
}

// Where a block's maps lie in the bytes: for each model the norm, then one map a query of its own, then the outlier bits.
const sizes = M.models.map((queries) => CELLS * (1 + queries.length) + Math.ceil(CELLS / 8));
const total = (values) => values.reduce((a, b) => a + b, 0);

function layersOf(bytes, slot, model) {
  const from = slot * total(sizes) + total(sizes.slice(0, model)), queries = M.models[model];
  const layer = (n) => bytes.subarray(from + n * CELLS, from + (n + 1) * CELLS);
  const bits = layer(1 + queries.length), query = queries.indexOf(M.queries[state.query]);
  const outliers = Array.from({ length: CELLS }, (_, i) => (bits[i >> 3] >> (7 - (i & 7))) & 1);
  return { slot, norm: layer(0), attention: query < 0 ? null : layer(1 + query), outliers };
}

const normAt = ({ slot, norm }, i) => decode(M.norm_range[slot], norm[i]);
const attentionAt = ({ slot, attention }, i) => decode(M.attention_range[state.query][slot], attention[i]);
const largestNorm = (layers) => normAt(layers, layers.norm.indexOf(Math.max(...layers.norm)));

// Large reports keep the maps of some blocks only; the nearest of them stands in.
const slotOf = (block) => M.blocks.reduce((best, k, i) => (Math.abs(k - block) < Math.abs(M.blocks[best] - block) ? i : best), 0);

function paintPhoto(canvas, image) {
  const pen = fit(canvas);
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  return pen;
}

const paintNorm = (canvas, { norm }) => paint(canvas, (i) => colorAt("viridis", norm[i]));

// The root of the attention: linear shows a few patches on black, logarithmic makes them drown in the rest.
function paintAttention(canvas, { slot, attention }) {
  const range = M.attention_range[state.query][slot];
  const rooted = Array.from({ length: 256 }, (_, c) => 255 * Math.sqrt(decode(range, c) / range[1]));
  return paint(canvas, (i) => colorAt("magma", rooted[attention[i]]));
}

const placeOf = (patch) => [Math.floor(patch / COLUMNS), patch % COLUMNS];
const patchName = (patch) => `Row ${placeOf(patch)[0]}, column ${placeOf(patch)[1]}`;

function markPatch(pen, patch) {
  const w = pen.canvas.width / COLUMNS, h = pen.canvas.height / ROWS, [row, column] = placeOf(patch);
  pen.beginPath();
  pen.rect(column * w, row * h, w, h);
  stroke(pen, 2, "#fff");
}

function patchUnder(event) {
  const box = event.currentTarget.getBoundingClientRect();
  const clamp = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v * n)));
  return clamp((event.clientY - box.top) / box.height, ROWS) * COLUMNS + clamp((event.clientX - box.left) / box.width, COLUMNS);
}

// A line may end after a separator of a file name, rather than in the middle of a word.
const breakable = (name) => name.split(/(?<=[-_/\\])/).flatMap((part) => [part, node("wbr")]);
const canvasesOf = (name, captions) => captions.map((what) => node("canvas", { role: "img", ariaLabel: `${what} of ${name}` }));

// A card for one image, in whose `panels` a patch can be pointed at; `parts` is what `draw.image` needs besides.
function addCard({ name, photo }, parts, ...children) {
  const example = { ...parts, patch: null, image: node("img", { src: photo }) };
  const card = node("article", { className: "example", tabIndex: 0, ariaLabel: name }, ...children);
  const point = (patch) => { if (patch !== example.patch) { example.patch = patch; draw.image(example); } };
  for (const panel of example.panels) {
    panel.onpointerdown = panel.onpointermove = (event) => point(patchUnder(event));
    panel.onpointerleave = (event) => { if (event.pointerType === "mouse") point(null); };
  }
  card.onkeydown = (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") point(null);
    if (!step) return;
    event.preventDefault();
    const [row, column] = example.patch === null ? [0, 0] : placeOf(example.patch).map((at, i) => at + step[i]);
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
    scaleBar(byId("attention-scale"), "", "magma", [0, most / 4, most].map(percent));
  }
  byId("thinned").textContent = kept === state.block ? "" : `To keep this file small it holds the maps of some blocks only; these are of block ${kept}, the nearest.`;
  examples.forEach(draw.image);
}
