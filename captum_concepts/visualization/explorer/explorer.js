// The concept explorer. Names come from outside, so every text goes through textContent; nothing is parsed as HTML.
// Read from top to bottom: data, regions, arithmetic, state, what is shown, what people do.

const $ = (id) => document.getElementById(id);
const about = JSON.parse($("about").textContent);

// Plain loops: half a million cells per image pass through them.
function bytes(text) {
  const letters = atob(text);
  const found = new Uint8Array(letters.length);
  for (let k = 0; k < found.length; k++) found[k] = letters.charCodeAt(k);
  return found;
}

function numbers(count, value) {
  const found = new Float64Array(count);
  for (let k = 0; k < count; k++) found[k] = value(k);
  return found;
}

const floats = (text) => (text === null ? null : new Float32Array(bytes(text).buffer));
const palette = bytes(about.palette); // red, green, blue and opacity of each step
const head = about.head && {
  weights: floats(about.head.weights),
  starts: about.head.starts && new Int32Array(bytes(about.head.starts).buffer),
  classes: about.head.classes && new Int32Array(bytes(about.head.classes).buffer),
};
const LAZY = 20; // thumbnails beyond this number of images are decoded when they come into view
const ROWS = 40;
const CLASSES = 20;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children); // strings become text nodes
  return element;
}

// ------------------------------------------------------------------------------------------------------------ data

const loaded = new Map();

function load(number) {
  if (!loaded.has(number)) {
    const raw = JSON.parse($(`image-${number}`).textContent);
    const [width, height] = raw.size;
    const [across, down] = raw.grid;
    const low = floats(raw.low);
    const step = floats(raw.step);
    const stored = new Uint16Array(bytes(raw.maps).buffer);
    const cells = across * down;
    const maps = new Float32Array(stored.length);
    for (let row = 0; row < low.length; row++) {
      for (let k = row * cells; k < (row + 1) * cells; k++) {
        maps[k] = stored[k] === 65535 ? NaN : low[row] + step[row] * stored[k];
      }
    }
    const rows = raw.rows ?? about.concepts.map((_, k) => k);
    loaded.set(number, {
      ...raw, width, height, across, down, cells, maps, rows,
      places: new Map(rows.map((concept, k) => [concept, k])),
      scores: floats(raw.scores),
      contributions: floats(raw.contributions),
      presence: floats(raw.presence),
      logits: floats(raw.logits),
    });
    if (loaded.size > LAZY) loaded.delete(loaded.keys().next().value);
  }
  return loaded.get(number);
}

// --------------------------------------------------------------------------------------------------------- regions
// A region says how much of each pixel belongs to it: rows x columns where it is a box, else a mask of whole pixels and
// its runs. null is the whole image.

function span(start, stop, count) {
  return numbers(count, (p) => Math.max(0, Math.min(p + 1, stop) - Math.max(p, start)));
}

function boxRegion(data, x0, y0, x1, y1, points = null) {
  const rows = span(y0, y1, data.height);
  const columns = span(x0, x1, data.width);
  return finish(data, { kind: points ? "points" : "boxes", box: [x0, y0, x1, y1], points, rows, columns });
}

function cellRegion(data, x, y) {
  const dx = data.width / data.across;
  const dy = data.height / data.down;
  const column = Math.min(Math.floor(x / dx), data.across - 1);
  const row = Math.min(Math.floor(y / dy), data.down - 1);
  return boxRegion(data, column * dx, row * dy, (column + 1) * dx, (row + 1) * dy, [round2(x), round2(y)]);
}

const maskRegion = (data, mask) => finish(data, { kind: "mask", mask, runs: runs(data, mask) });

// [row, start, stop] of every run of a mask.
function runs(data, mask) {
  const found = [];
  for (let y = 0; y < data.height; y++) {
    const row = mask.subarray(y * data.width, (y + 1) * data.width);
    for (let start = row.indexOf(1); start >= 0;) {
      const end = row.indexOf(0, start);
      found.push([y, start, end < 0 ? data.width : end]);
      start = end < 0 ? -1 : row.indexOf(1, end);
    }
  }
  return found;
}

// Bilinear enlarging is linear: the sum of an enlarged map under a region is the map times these weights of its cells.
function enlarged(cover, cells) {
  const weights = new Float64Array(cells);
  cover.forEach((value, p) => {
    if (!value) return;
    const at = Math.max(0, ((p + 0.5) * cells) / cover.length - 0.5);
    const first = Math.min(Math.floor(at), cells - 1);
    const second = Math.min(first + 1, cells - 1);
    weights[first] += value * (1 - (at - first));
    weights[second] += value * (at - first);
  });
  return weights;
}

// How much of each cell is covered, from 0 to 1.
function covered(cover, cells) {
  const share = new Float64Array(cells);
  const side = cover.length / cells;
  for (let cell = 0; cell < cells; cell++) {
    for (let p = Math.floor(cell * side); p < Math.min(Math.ceil((cell + 1) * side), cover.length); p++) {
      share[cell] += (cover[p] * (Math.min(p + 1, (cell + 1) * side) - Math.max(p, cell * side))) / side;
    }
  }
  return share;
}

function outer(rows, columns) {
  const product = new Float64Array(rows.length * columns.length);
  rows.forEach((a, i) => columns.forEach((b, j) => { product[i * columns.length + j] = a * b; }));
  return product;
}

function along(data, region, reduce) {
  // Rows of pixels become rows of cells, first across and then down.
  const wide = [];
  for (const [y] of region.runs) {
    wide[y] ??= reduce(region.mask.subarray(y * data.width, (y + 1) * data.width), data.across);
  }
  const result = new Float64Array(data.cells);
  for (let column = 0; column < data.across; column++) {
    reduce(numbers(data.height, (y) => wide[y]?.[column] ?? 0), data.down).forEach((value, row) => {
      result[row * data.across + column] = value;
    });
  }
  return result;
}

function finish(data, region) {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  if (region.mask) {
    region.total = region.runs.reduce((total, [, start, stop]) => total + stop - start, 0);
    region.weights = along(data, region, enlarged);
    region.share = along(data, region, covered);
  } else {
    region.total = sum(region.rows) * sum(region.columns);
    region.weights = outer(enlarged(region.rows, data.down), enlarged(region.columns, data.across));
    region.share = outer(covered(region.rows, data.down), covered(region.columns, data.across));
  }
  return region;
}

const at = (data, region, x, y) =>
  region === null ? 1 : region.mask ? region.mask[y * data.width + x] : region.rows[y] * region.columns[x];

const area = (data, region) => (region === null ? data.width * data.height : region.total);

// The pixels that two regions share.
function overlap(data, first, second) {
  if (first === null || second === null) return area(data, first ?? second);
  if (!first.mask && !second.mask) {
    const dot = (a, b) => a.reduce((total, value, k) => total + value * b[k], 0);
    return dot(first.rows, second.rows) * dot(first.columns, second.columns);
  }
  const [mask, other] = first.mask ? [first, second] : [second, first];
  let total = 0;
  for (const [y, start, stop] of mask.runs) {
    for (let x = start; x < stop; x++) total += at(data, other, x, y);
  }
  return total;
}

// ------------------------------------------------------------------------------------------------------ arithmetic

function weighted(data, row, weights) {
  const start = row * data.cells;
  let total = 0;
  for (let k = 0; k < data.cells; k++) if (weights[k]) total += weights[k] * data.maps[start + k];
  return total;
}

// What is seen in a region: the mean of each enlarged map; in the whole image: the image's own scores.
function scoresOf(data, region) {
  if (region === null) return data.scores;
  region.scores ??= numbers(data.rows.length, (row) => weighted(data, row, region.weights) / region.total);
  return region.scores;
}

function weightOf(concept, output) {
  if (!head.starts) return head.weights[concept * about.classes.length + output];
  for (let k = head.starts[concept]; k < head.starts[concept + 1]; k++) {
    if (head.classes[k] === output) return head.weights[k];
  }
  return 0;
}

// The part of each concept's contribution that comes from the region.
function contributionsOf(data, region) {
  if (!about.editable) return data.contributions;
  const part = region ?? data;
  part.how ??= numbers(data.rows.length, (row) => {
    const seen = region === null ? data.scores[row] : weighted(data, row, region.share) / data.cells;
    return weightOf(data.rows[row], data.target) * seen;
  });
  return part.how;
}

function logitsAfter(data, edits) {
  const logits = new Float64Array(data.logits);
  for (const edit of edits) {
    const shift = (edit.beta * area(data, edit.region)) / (data.width * data.height);
    if (head.starts) {
      for (let k = head.starts[edit.concept]; k < head.starts[edit.concept + 1]; k++) {
        logits[head.classes[k]] += head.weights[k] * shift;
      }
    } else {
      const start = edit.concept * logits.length;
      for (let k = 0; k < logits.length; k++) logits[k] += head.weights[start + k] * shift;
    }
  }
  return logits;
}

function probabilities(logits) {
  if (about.independent) return logits.map((value) => 1 / (1 + Math.exp(-value)));
  const top = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = logits.map((value) => Math.exp(value - top));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / total);
}

function scoresAfter(data, region, edits, scores) {
  const after = new Float64Array(scores);
  for (const edit of edits) {
    after[data.places.get(edit.concept)] += (edit.beta * overlap(data, region, edit.region)) / area(data, region);
  }
  return after;
}

function order(values) {
  const rank = values.map((value) => (Number.isNaN(value) ? -Infinity : value));
  return Array.from(values.keys()).sort((a, b) => rank[b] - rank[a] || a - b);
}

// ----------------------------------------------------------------------------------------------------------- state

const state = {
  image: 0,
  tool: "box",
  concept: null, // number of the concept whose map is shown
  chosen: false, // whether somebody chose it; otherwise it is the strongest of the region
  cursor: null, // cell under the keyboard
  anchor: null,
  by: "score", // what the concepts are sorted by
  rows: ROWS,
  classes: CLASSES,
  map: true,
};
const own = new Map(); // of each image: region, edits, history

function mine(number = state.image) {
  if (!own.has(number)) own.set(number, { region: null, edits: [], history: [], pending: null });
  return own.get(number);
}

const sameEdit = (edit) => edit.concept === state.concept && edit.region === mine().region;
const called = about.predicts
  ? { of: "predicted ", wrong: "wrong prediction", right: "right prediction", count: "wrong" }
  : { of: "explained: ", wrong: "explained class is not the true label", right: "explained class is the true label",
    count: "whose explained class is not the true label" };
const round2 = (value) => Math.round(value * 100) / 100;

// ---------------------------------------------------------------------------------------------------------- numbers

function short(value, sign = false) {
  if (!Number.isFinite(value)) return "n/a";
  const size = Math.abs(value);
  if (size > 0 && size < 0.001) return sign ? (value > 0 ? "+0" : "−0") : value > 0 ? "< 0.001" : "> −0.001";
  if (size === 0) return "0";
  const text = size >= 1000 ? size.toFixed(0) : String(Number(size.toPrecision(3)));
  return (value < 0 ? "−" : sign ? "+" : "") + text;
}

const percent = (value) => (!Number.isFinite(value) ? "n/a" : value >= 0.9995 && value < 1 ? "> 99.9 %" : value > 0 && value < 0.001 ? "< 0.1 %"
  : `${Number((100 * value).toPrecision(3))} %`).replaceAll(" ", "\u00a0"); // stays on one line

function regionWords(region) {
  if (region === null) return "the whole image";
  if (region.kind === "mask") return `a brushed area of ${Math.round(region.total)} pixels`;
  const [x0, y0, x1, y1] = region.box.map((value) => Number(value.toFixed(1)));
  return region.points ? `the cell at (${Number(region.points[0].toFixed(1))}, ${Number(region.points[1].toFixed(1))})`
    : `the box (${x0}, ${y0}) to (${x1}, ${y1})`;
}

// ----------------------------------------------------------------------------------------------------------- pixels

let sheet = null; // the pixels of the map painted last: new ones for every click would be collected in the midst of one

// A map over an image: bilinear, with the palette's colors and opacities.
function paint(canvas, data, concept, edits) {
  const row = data.places.get(concept);
  const factor = Math.min(1, 224 / Math.max(data.width, data.height)) * (data.width < 100 && data.height < 100 ? 2 : 1);
  const width = Math.max(1, Math.round(data.width * factor));
  const height = Math.max(1, Math.round(data.height * factor));
  if (canvas.width !== width) canvas.width = width; // setting it makes new memory
  if (canvas.height !== height) canvas.height = height;
  if (row === undefined || !state.map) {
    canvas.getContext("2d").clearRect(0, 0, width, height);
    return;
  }
  const changes = edits.filter((edit) => edit.concept === concept);
  if (sheet?.width !== width || sheet.height !== height) sheet = new ImageData(width, height);
  const [colors, steps] = [sheet.data, palette].map((part) => new Uint32Array(part.buffer));
  const place = (count, cells) => {
    const first = new Uint16Array(count);
    const over = numbers(count, (p) => {
      const where = Math.max(0, ((p + 0.5) * cells) / count - 0.5);
      first[p] = Math.min(Math.floor(where), cells - 1);
      return where - first[p];
    });
    return [first, over];
  };
  const [left, over] = place(width, data.across);
  const [top, down] = place(height, data.down);
  const line = new Float64Array(data.across + 1); // one row of the map between its cells; the last cell twice
  const [scale, middle] = about.signed ? [127.5 / data.end, 127.5] : [255 / data.end, 0];
  for (let y = 0; y < height; y++) {
    const upper = row * data.cells + top[y] * data.across;
    const lower = upper + (top[y] + 1 < data.down ? data.across : 0);
    for (let j = 0; j < line.length; j++) {
      const cell = Math.min(j, data.across - 1);
      line[j] = (1 - down[y]) * data.maps[upper + cell] + down[y] * data.maps[lower + cell];
    }
    const py = Math.min(Math.floor(((y + 0.5) * data.height) / height), data.height - 1);
    for (let x = 0; x < width; x++) {
      let value = (1 - over[x]) * line[left[x]] + over[x] * line[left[x] + 1];
      for (const edit of changes) {
        value += edit.beta * at(data, edit.region, Math.min(Math.floor(((x + 0.5) * data.width) / width), data.width - 1), py);
      }
      const step = Math.round(Math.min(255, Math.max(0, value * scale + middle)));
      colors[y * width + x] = Number.isNaN(step) ? 0 : steps[step];
    }
  }
  canvas.getContext("2d").putImageData(sheet, 0, 0);
}

const sizes = new Map(); // of the stages, once laid out: asking for them would lay the page out a second time

function outline(canvas, data, regions, cursor) {
  const box = sizes.get(canvas.parentElement) ?? { width: 1, height: 1 };
  const dense = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(box.width * dense));
  canvas.height = Math.max(1, Math.round(box.height * dense));
  const pen = canvas.getContext("2d");
  pen.scale(canvas.width / data.width, canvas.height / data.height);
  const unit = data.width / box.width;
  const frame = ([x0, y0, x1, y1], color, dash = []) => {
    pen.setLineDash(dash.map((length) => length * unit));
    for (const [width, style] of [[4, "#000"], [2, color]]) {
      pen.lineWidth = width * unit;
      pen.strokeStyle = style;
      pen.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
  };
  for (const region of regions.filter(Boolean)) {
    if (!region.mask) {
      frame(region.box, "#ffd92f");
      continue;
    }
    pen.fillStyle = "rgba(255, 217, 47, .5)";
    for (const [y, start, stop] of region.runs) pen.fillRect(start, y, stop - start, 1);
  }
  if (cursor) {
    const dx = data.width / data.across;
    const dy = data.height / data.down;
    frame([cursor[0] * dx, cursor[1] * dy, (cursor[0] + 1) * dx, (cursor[1] + 1) * dy], "#fff", [4, 4]);
  }
}

// ------------------------------------------------------------------------------------------------------------ shown

// Rows stay in place and only what changed is written: the focus stays where it is, and a click costs little.
const lists = new Map();

function fill(list, items, create, write) {
  if (!lists.has(list)) lists.set(list, []);
  const rows = lists.get(list);
  while (rows.length > items.length) rows.pop().element.remove();
  while (rows.length < items.length) {
    rows.push(create());
    list.append(rows.at(-1).element);
  }
  items.forEach((item, k) => write(rows[k], item));
}

function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function put(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (element.getAttribute(name) !== value) element.setAttribute(name, value);
  }
}

function bar() {
  const piece = make("i");
  return { element: make("span", { class: "bar", "aria-hidden": "true" }, piece), piece };
}

function writeBar({ element, piece }, value, end, middle) {
  const length = Number.isFinite(value) && end > 0 ? round2(Math.min(Math.abs(value) / end, 1) * (middle ? 50 : 100)) : 0;
  const [width, left] = [`${length}%`, `${middle ? (value >= 0 ? 50 : round2(50 - length)) : 0}%`];
  put(element, { class: middle ? "bar middle" : "bar" });
  put(piece, { class: value >= 0 ? "for" : "against" });
  if (piece.style.width !== width) piece.style.width = width;
  if (piece.style.left !== left) piece.style.left = left;
}

function conceptRow(testid) {
  const row = { concept: null, name: make("bdi"), detail: make("small"), score: new Text(), bar: bar(), how: new Text(), howBar: bar() };
  row.contribution = make("span", { class: "number how" }, row.how, row.howBar.element);
  const parts = [
    make("span", { class: "name" }, row.name, row.detail),
    make("span", { class: "number score" }, row.score, row.bar.element),
    row.contribution,
  ];
  if (testid === "concept") {
    row.marked = make("button", { type: "button", class: "row", "data-testid": testid }, ...parts);
    row.marked.addEventListener("click", () => choose(row.concept));
    row.element = make("li", {}, row.marked);
  } else row.element = row.marked = make("li", { class: "row", "data-testid": testid }, ...parts);
  return row;
}

function writeConcept(row, data, place, score, how, ends) {
  row.concept = data.rows[place];
  const name = about.concepts[row.concept];
  const pale = Boolean(data.presence && data.presence[place] < about.seen);
  say(row.name, name);
  row.detail.hidden = !pale;
  if (pale) say(row.detail, `not seen (presence ${short(data.presence[place])})`);
  say(row.score, short(score, ends.signed));
  writeBar(row.bar, score, ends.score, ends.signed);
  row.contribution.hidden = !how;
  if (how) {
    say(row.how, short(how[place], true));
    writeBar(row.howBar, how[place], ends.how, true);
  }
  row.element.classList.toggle("pale", pale);
  put(row.marked, { "data-concept": name, "data-score": String(score) });
  if (row.marked !== row.element) put(row.marked, { "aria-pressed": String(row.concept === state.concept) });
}

function ends(scores, how, rows) {
  const largest = (values) => rows.reduce((a, k) => (Number.isFinite(values[k]) ? Math.max(a, Math.abs(values[k])) : a), 0);
  const signed = about.editable || rows.some((k) => scores[k] < 0);
  return { score: largest(scores), how: how ? largest(how) : 0, signed };
}

function showConcepts() {
  const data = load(state.image);
  const region = mine().region;
  const scores = scoresOf(data, region);
  const how = contributionsOf(data, region);
  const ranked = order(state.by === "how" && how ? how.map(Math.abs) : scores);
  if (!about.editable && region === null && data.presence) {
    ranked.sort((a, b) => (data.presence[a] < about.seen) - (data.presence[b] < about.seen)); // not seen: last
  }
  if (!state.chosen || !data.places.has(state.concept)) state.concept = data.rows[ranked[0]] ?? null;
  const wanted = $("find-concept").value.trim().toLowerCase();
  const found = wanted ? ranked.filter((row) => about.concepts[data.rows[row]].toLowerCase().includes(wanted)) : ranked;
  const shown = found.slice(0, state.rows);
  const limits = ends(scores, how, shown);
  fill($("concepts"), shown, () => conceptRow("concept"), (row, k) => writeConcept(row, data, k, scores[k], how, limits));
  $("no-concept").hidden = found.length > 0;
  $("more-concepts").hidden = found.length <= shown.length;
  $("more-concepts").textContent = `Show more (${found.length - shown.length})`;
  $("region-line").textContent = region === null
    ? "Seen in the whole image. Mark a region on the image to ask about a part of it."
    : `Seen in ${regionWords(region)}.`;
  const unit = region === null || about.editable ? about.scoreUnit : "mean of the map";
  $("score-head").textContent = unit ? `score, ${unit}` : "score";
  const target = data.target === null ? "" : ` to ${about.classes[data.target]}`;
  const whole = !about.editable && region !== null ? ", whole image" : "";
  $("how-head").textContent = how ? `contribution${target}${about.contributionUnit && `, ${about.contributionUnit}`}${whole}` : "";
  $("how-head").hidden = !how;
  document.body.classList.toggle("with-how", Boolean(how));
  return scores;
}

function editRow() {
  const row = { edit: null, beta: new Text(), name: make("bdi"), where: new Text() };
  const back = make("button", { type: "button", class: "link" }, row.beta, row.name, row.where);
  back.addEventListener("click", () => { mine().region = row.edit.region; choose(row.edit.concept); });
  row.drop = make("button", { type: "button", class: "drop" }, "×");
  row.drop.addEventListener("click", () => { remember(); mine().edits = mine().edits.filter((one) => one !== row.edit); commit(); });
  row.element = make("li", {}, back, row.drop);
  return row;
}

function showEdits(scores) {
  if (!about.editable) return;
  const data = load(state.image);
  const { region, edits } = mine();
  const current = edits.find(sameEdit);
  const reach = 4 / (area(data, region) / (data.width * data.height));
  const end = Math.max(10, Math.ceil(reach / 10) * 10);
  const slider = $("beta");
  slider.min = -end;
  slider.max = end;
  slider.disabled = state.concept === null;
  slider.value = current?.beta ?? 0;
  const name = about.concepts[state.concept] ?? "";
  slider.setAttribute("aria-label", `Change of ${name} in ${regionWords(region)}, standard deviations`);
  $("beta-out").textContent = short(current?.beta ?? 0, true);
  $("edit-line").replaceChildren("Add to ", make("strong", {}, make("bdi", {}, name)), ` in ${regionWords(region)}:`);
  const part = area(data, region) / (data.width * data.height);
  $("beta-line").textContent = `Standard deviations of the concept. The region is ${percent(part)} of the image.`;
  $("undo").disabled = !(mine().history.length || mine().pending);
  $("reset").disabled = !edits.length;
  fill($("edits"), edits, editRow, (row, edit) => {
    row.edit = edit;
    const concept = about.concepts[edit.concept];
    say(row.beta, `${short(edit.beta, true)} `);
    say(row.name, concept);
    say(row.where, ` in ${regionWords(edit.region)}`);
    put(row.drop, { "aria-label": `Remove the edit of ${concept}` });
  });
  document.body.classList.toggle("edited", edits.length > 0);
  const after = edits.length ? scoresAfter(data, region, edits, scores) : scores;
  const edited = new Set(edits.map((edit) => data.places.get(edit.concept))); // shown wherever they have gone
  const shown = order(after).filter((row, k) => k < 12 || edited.has(row));
  const limits = ends(after, null, shown);
  fill($("after"), shown, () => conceptRow("region-concept-after"), (row, k) => writeConcept(row, data, k, after[k], null, limits));
  $("after-line").textContent = `In ${regionWords(region)}.`;
}

function classRow() {
  const row = { name: make("bdi"), truth: make("small", {}, "true label"), number: new Text(), before: bar(), after: bar() };
  row.element = make(
    "li", { class: "row", "data-testid": "class" },
    make("span", { class: "name" }, row.name, row.truth),
    make("span", { class: "number" }, row.number, row.before.element, row.after.element),
  );
  return row;
}

function showClasses() {
  const data = load(state.image);
  let before;
  let after;
  if (data.logits) {
    before = probabilities(new Float64Array(data.logits));
    after = mine().edits.length ? probabilities(logitsAfter(data, mine().edits)) : before;
  } else if (data.target !== null && data.probability !== null) {
    before = after = [data.probability];
  }
  $("classes-panel").hidden = !before;
  if (!before) return;
  const { true: outputs } = about.images[state.image];
  let shown = order(before);
  if (!data.logits) shown = [0];
  else if (shown.length > state.classes) {
    const kept = new Set([...shown.slice(0, state.classes / 2), ...order(after).slice(0, state.classes / 4)]);
    outputs.forEach((k) => kept.add(k));
    $("more-classes").textContent = `Show all ${shown.length} classes`;
    $("more-classes").hidden = false;
    shown = shown.filter((k) => kept.has(k));
  } else $("more-classes").hidden = true;
  const edited = mine().edits.length > 0;
  fill($("classes"), shown, classRow, (row, k) => {
    const output = data.logits ? k : data.target;
    const name = about.classes[output];
    say(row.name, name);
    row.truth.hidden = !outputs.includes(output);
    say(row.number, edited ? `${percent(before[k])} → ${percent(after[k])}` : percent(before[k]));
    writeBar(row.before, before[k], 1, false);
    writeBar(row.after, after[k], 1, false);
    row.after.element.hidden = !edited;
    put(row.element, { "data-class": name, "data-before": String(before[k]), "data-after": String(after[k]) });
  });
  $("classes-line").textContent = !data.logits ? "The explained class."
    : mine().edits.length ? "Probability before (gray) and after the edits." : "Probability.";
}

function showMarks() {
  const data = load(state.image);
  const { region, edits } = mine();
  outline($("marks"), data, [region], state.cursor);
  if (edits.length) outline($("marks-after"), data, [region, ...edits.map((edit) => edit.region)], null);
}

function showPixels() {
  const data = load(state.image);
  const { edits } = mine();
  paint($("heat"), data, state.concept, []);
  if (edits.length) paint($("heat-after"), data, state.concept, edits);
  showMarks();
  const low = about.signed ? `≤ ${short(-data.end)}` : "0";
  $("legend-low").textContent = low;
  $("legend-high").textContent = `≥ ${short(data.end)}`;
  const name = about.concepts[state.concept] ?? "";
  $("map-line").replaceChildren("Map of ", make("strong", {}, make("bdi", {}, name)), about.mapUnit ? `, ${about.mapUnit}` : "",
    about.signed && about.editable ? "; 0 is its average in the training images" : "");
}

// In pixels of what the model gets, which a transform may have resized.
function literal(data, region, names) {
  if (region === null) return "";
  const sides = [data.inputs[0] / data.width, data.inputs[1] / data.height];
  const scaled = (values) => values.map((value, k) => round2(value * sides[k % 2])).join(", ");
  if (region.kind === "points") return `points=(${scaled(region.points)})`;
  if (region.kind === "boxes") return `boxes=(${scaled(region.box)})`;
  return `mask=${names.get(region)}`;
}

// Python that does the same; region and edits as the methods take them.
function showPython() {
  const data = load(state.image);
  const { region, edits } = mine();
  const lines = [];
  const masks = [...new Set([region, ...edits.map((edit) => edit.region)])].filter((one) => one?.mask);
  const names = new Map(masks.map((one, k) => [one, masks.length > 1 ? `mask_${k + 1}` : "mask"]));
  if (masks.length) lines.push("import torch");
  const saved = about.reader === ""; // an explanation, without what made it
  const reads = about.reader.match(/inputs_for|open_images/)?.[0];
  if (reads) lines.push(`from captum_concepts.images import ${reads}`);
  const resized = about.editable && data.inputs.join() !== [data.width, data.height].join();
  if (about.editable ? masks.length && resized : region) lines.push("from torch.nn.functional import interpolate");
  if (lines.length) lines.push("");
  const given = about.editable ? "model: the SALFCBM" : saved ? "explanation: as passed to explore()" : "explainer: the method";
  const passed = about.reader.startsWith("transform(") ? "images, transform" : "images";
  lines.push(`# ${given}${saved || about.setup ? "" : `; ${passed}: as passed to explore()`}`);
  if (!saved) {
    if (about.setup) lines.push(...about.setup.split("\n"));
    const name = JSON.stringify(about.images[state.image].file);
    lines.push(`image = ${about.reader.replace(/\bFILE\b/, () => name).replace(/\bK\b/, state.image)}`);
  }
  const target = about.asked ? `, target=${data.target}` : "";
  for (const [one, name] of names) {
    lines.push(`${name} = torch.zeros(${data.height}, ${data.width})`, `for y, start, stop in [`);
    const parts = one.runs.map((run) => `(${run.join(", ")})`);
    for (let k = 0; k < parts.length; k += 6) lines.push(`    ${parts.slice(k, k + 6).join(", ")},`);
    lines.push("]:", `    ${name}[y, start:stop] = 1`);
    if (resized) lines.push(`${name} = interpolate(${name}[None, None], (${data.inputs[1]}, ${data.inputs[0]}), mode="nearest-exact")[0, 0]`);
  }
  if (about.editable) {
    lines.push(region === null ? `seen = model.explain(image${target})` : `seen = model.explain_region(image, ${literal(data, region, names)}, units="std"${target})`);
    if (edits.length) {
      lines.push("edits = [");
      for (const edit of edits) {
        const where = literal(data, edit.region, names).replace(/^(\w+)=/, ', "$1": ');
        lines.push(`    {"concept": ${JSON.stringify(about.concepts[edit.concept])}, "beta": ${edit.beta}${where}},`);
      }
      lines.push("]", 'before, after = model.intervene(image, edits, units="std")');
      lines.push(about.independent ? "probabilities = after.sigmoid()" : "probabilities = after.softmax(1)");
    }
  } else if (region === null) {
    lines.push(saved ? `seen = explanation[${state.image}]` : `seen = explainer.explain(image${target})`);
  } else {
    lines.push(saved ? `maps = explanation[${state.image}].maps` : "maps = explainer.concept_maps(image)");
    lines.push(`large = interpolate(maps.float(), (${data.height}, ${data.width}), mode="bilinear")[0]`);
    if (region.mask) lines.push("scores = (large * mask).sum((1, 2)) / mask.sum()");
    else {
      const [x0, y0, x1, y1] = region.box.map(Math.round);
      lines.push(`scores = large[:, ${y0}:${y1}, ${x0}:${x1}].mean((1, 2))`);
    }
  }
  $("python").textContent = lines.join("\n");
}

function keywords(region) {
  if (region === null) return {};
  if (region.kind === "points") return { points: region.points };
  if (region.kind === "boxes") return { boxes: region.box.map(round2) };
  return { mask: region.runs };
}

// The notebook hears what was marked and changed.
function tell() {
  if (window.parent === window) return;
  const edits = {};
  for (const [number, one] of own) {
    if (one.edits.length) {
      edits[number] = one.edits.map((edit) => ({ concept: about.concepts[edit.concept], beta: edit.beta, ...keywords(edit.region) }));
    }
  }
  const message = { image: state.image, region: keywords(mine().region), edits };
  window.parent.postMessage({ from: "captum_concepts", state: message }, "*");
}

function show(announce = "") {
  showEdits(showConcepts());
  showClasses();
  showPixels();
  showPython();
  const { region } = mine();
  $("stage").setAttribute("aria-label", `${about.images[state.image].name}: mark a region. Tool: ${state.tool}. Marked: ${regionWords(region)}.`);
  $("stage-after").setAttribute("aria-label", `${about.images[state.image].name} after the edits`);
  if (announce) $("live").textContent = announce;
  tell();
}

function announceRegion() {
  const data = load(state.image);
  const scores = scoresOf(data, mine().region);
  const words = order(scores).slice(0, 3).map((row) => `${about.concepts[data.rows[row]]} ${short(scores[row])}`);
  return `In ${regionWords(mine().region)}: ${words.join(", ")}`;
}

function announceClasses() {
  const data = load(state.image);
  const before = probabilities(new Float64Array(data.logits));
  const after = probabilities(logitsAfter(data, mine().edits));
  const top = order(after)[0];
  return `${about.classes[top]}: ${percent(before[top])} before, ${percent(after[top])} after`;
}

// ---------------------------------------------------------------------------------------------------------- actions

function choose(concept) {
  state.concept = concept;
  state.chosen = true;
  show();
}

function setRegion(region, announce = true) {
  const known = region === mine().region;
  mine().region = region;
  if (!known) show();
  if (announce) $("live").textContent = announceRegion();
}

function setImage(number) {
  gesture = null; // what was being marked belongs to the image before
  state.image = number;
  state.cursor = null;
  state.rows = ROWS;
  const data = load(number);
  const filed = about.images[number];
  for (const id of ["base", "base-after"]) {
    $(id).src = data.picture;
    $(id).classList.toggle("pixels", data.pixelated);
  }
  $("base").alt = filed.name;
  for (const stage of document.querySelectorAll(".stage")) {
    stage.style.setProperty("--w", data.width);
    stage.style.setProperty("--h", data.height);
  }
  $("name").replaceChildren(make("bdi", {}, filed.name));
  const predicted = filed.predicted === null ? [] : [called.of, make("strong", {}, make("bdi", {}, about.classes[filed.predicted]))];
  const truth = filed.label === null ? [] : [predicted.length ? "; true label " : "true label ", make("strong", {}, make("bdi", {}, filed.label))];
  $("verdict-line").replaceChildren(...predicted, ...truth);
  $("verdict-line").className = `soft ${filed.verdict}`;
  for (const button of $("strip").children) {
    const current = Number(button.dataset.index) === number;
    button.setAttribute("aria-pressed", String(current));
    button.tabIndex = current ? 0 : -1;
    if (current) button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  show();
}

function setTool(tool) {
  state.tool = tool;
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  }
  $("brush-size-label").hidden = tool !== "brush";
  $("stage").dataset.tool = tool;
}

// History: what the edits were before a gesture is kept once the gesture ends.
function remember() {
  mine().pending ??= mine().edits.slice();
}

function commit(keep = true) {
  const image = mine();
  if (image.pending && keep) image.history.push(image.pending);
  image.pending = null;
  show(announceClasses());
}

function setBeta(value) {
  if (state.concept === null || !Number.isFinite(value)) return;
  remember();
  state.chosen = true;
  const image = mine();
  const edit = { concept: state.concept, region: image.region, beta: value };
  const place = image.edits.findIndex(sameEdit);
  image.edits = image.edits.slice();
  if (place < 0) image.edits.push(edit);
  else image.edits[place] = edit;
  if (value === 0) image.edits = image.edits.filter((one) => one !== edit);
}

function undo() {
  const image = mine();
  const before = image.pending ?? image.history.pop();
  image.pending = null;
  if (before) image.edits = before;
  if (about.editable) show(announceClasses());
}

// The pointer: one gesture from down to up.
let gesture = null;

function place(event) {
  const box = $("stage").getBoundingClientRect();
  const data = load(state.image);
  const clip = (value, end) => Math.min(Math.max(value, 0), end);
  return [clip(((event.clientX - box.left) / box.width) * data.width, data.width),
    clip(((event.clientY - box.top) / box.height) * data.height, data.height)];
}

const snap = (value) => (about.editable ? round2(value) : Math.round(value));

function boxOf(data, [ax, ay], [bx, by]) {
  const [x0, x1] = [snap(Math.min(ax, bx)), snap(Math.max(ax, bx))];
  const [y0, y1] = [snap(Math.min(ay, by)), snap(Math.max(ay, by))];
  return x1 > x0 && y1 > y0 ? boxRegion(data, x0, y0, x1, y1) : null;
}

function inside(data, [x, y]) {
  return cellRegion(data, Math.min(x, data.width - 0.01), Math.min(y, data.height - 0.01));
}

function brush(data, mask, [ax, ay], [bx, by]) {
  const radius = (Number($("brush-size").value) / 200) * Math.max(data.width, data.height);
  const length = (bx - ax) ** 2 + (by - ay) ** 2;
  const [left, right] = [Math.min(ax, bx) - radius, Math.max(ax, bx) + radius].map(Math.floor);
  const [top, bottom] = [Math.min(ay, by) - radius, Math.max(ay, by) + radius].map(Math.floor);
  let painted = false;
  for (let y = Math.max(0, top); y <= Math.min(bottom, data.height - 1); y++) {
    for (let x = Math.max(0, left); x <= Math.min(right, data.width - 1); x++) {
      const [px, py] = [x + 0.5 - ax, y + 0.5 - ay];
      const along = length ? Math.min(1, Math.max(0, (px * (bx - ax) + py * (by - ay)) / length)) : 0;
      if ((px - along * (bx - ax)) ** 2 + (py - along * (by - ay)) ** 2 > radius ** 2) continue;
      mask[y * data.width + x] = 1;
      painted = true;
    }
  }
  if (!painted) mask[Math.min(Math.floor(by), data.height - 1) * data.width + Math.min(Math.floor(bx), data.width - 1)] = 1;
}

function follow(event) {
  const data = load(state.image);
  const here = place(event);
  if (gesture.last?.join() === here.join()) return;
  if (state.tool === "point") gesture.region = inside(data, here);
  else if (state.tool === "box") {
    const far = Math.hypot(event.clientX - gesture.x, event.clientY - gesture.y) > 3;
    gesture.region = far ? boxOf(data, gesture.start, here) ?? gesture.region : inside(data, gesture.start);
  } else {
    brush(data, gesture.mask, gesture.last ?? here, here);
    gesture.region = maskRegion(data, gesture.mask);
  }
  gesture.last = here;
}

$("stage").addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || gesture) return;
  event.preventDefault();
  $("stage").focus({ preventScroll: true });
  $("stage").setPointerCapture(event.pointerId);
  const data = load(state.image);
  const old = mine().region;
  const mask = state.tool === "brush" ? new Uint8Array(data.width * data.height) : null;
  if (mask && old?.mask) mask.set(old.mask); // strokes add up
  gesture = { id: event.pointerId, x: event.clientX, y: event.clientY, start: place(event), last: null, mask, region: old, old };
  state.cursor = null;
  follow(event);
  setRegion(gesture.region, false);
});

let due = false;
$("stage").addEventListener("pointermove", (event) => {
  if (event.pointerId !== gesture?.id) return;
  follow(event);
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    if (gesture) setRegion(gesture.region, false);
  });
});

for (const kind of ["pointerup", "pointercancel"]) {
  $("stage").addEventListener(kind, (event) => {
    if (event.pointerId !== gesture?.id) return;
    if (kind === "pointerup" && state.tool !== "point") follow(event);
    const { region } = gesture;
    gesture = null;
    setRegion(region);
  });
}

// The keyboard on the image: a cursor of one cell.
$("stage").addEventListener("keydown", (event) => {
  const data = load(state.image);
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const dx = data.width / data.across;
  const dy = data.height / data.down;
  if (step) {
    event.preventDefault();
    const [x, y] = state.cursor ?? [Math.floor(data.across / 2), Math.floor(data.down / 2)];
    const moved = state.cursor || event.shiftKey ? step : [0, 0];
    if (event.shiftKey) state.anchor ??= [x, y];
    else state.anchor = null;
    state.cursor = [Math.min(Math.max(x + moved[0], 0), data.across - 1), Math.min(Math.max(y + moved[1], 0), data.down - 1)];
    if (!event.shiftKey) {
      showMarks();
      $("live").textContent = `Cell ${state.cursor[0] + 1} of ${data.across}, row ${state.cursor[1] + 1} of ${data.down}`;
      return;
    }
    const [[ax, ay], [bx, by]] = [state.anchor, state.cursor];
    setRegion(boxOf(data, [Math.min(ax, bx) * dx, Math.min(ay, by) * dy], [(Math.max(ax, bx) + 1) * dx, (Math.max(ay, by) + 1) * dy]));
  } else if (event.key === "Enter" || event.key === " ") {
    event.preventDefault();
    state.cursor ??= [Math.floor(data.across / 2), Math.floor(data.down / 2)];
    const center = [(state.cursor[0] + 0.5) * dx, (state.cursor[1] + 0.5) * dy];
    if (state.tool !== "brush") {
      setRegion(inside(data, center));
      return;
    }
    const mask = new Uint8Array(data.width * data.height);
    if (mine().region?.mask) mask.set(mine().region.mask);
    brush(data, mask, center, center);
    setRegion(maskRegion(data, mask));
  }
});

$("stage").addEventListener("blur", () => {
  if (!state.cursor) return;
  state.cursor = null;
  showMarks();
});

// The slider: pressing keys in a row is one step of the history.
let keyed = null;
const slider = $("beta");
slider.addEventListener("keydown", () => { keyed = { time: keyed?.time ?? -Infinity, edit: keyed?.edit, now: true }; });
slider.addEventListener("pointerdown", () => { keyed = null; });
slider.addEventListener("input", () => {
  setBeta(Number(slider.value));
  show();
});
slider.addEventListener("change", () => {
  setBeta(Number(slider.value));
  const now = performance.now();
  const edit = `${state.concept} ${mine().edits.findIndex(sameEdit)}`;
  const again = keyed?.now && keyed.edit === edit && now - keyed.time < 1000;
  keyed = keyed?.now ? { time: now, edit } : null;
  commit(!again);
});
for (const [id, sign] of [["minus", -1], ["plus", 1]]) {
  $(id).addEventListener("click", () => {
    const value = Math.round((Number(slider.value) + sign * Math.max(0.5, Number(slider.max) / 20)) * 10) / 10;
    setBeta(Math.min(Math.max(value, Number(slider.min)), Number(slider.max)));
    commit();
  });
}
$("undo").addEventListener("click", undo);
$("reset").addEventListener("click", () => {
  remember();
  mine().edits = [];
  commit();
});

for (const button of document.querySelectorAll("[data-tool]")) {
  button.addEventListener("click", () => setTool(button.dataset.tool));
}
for (const button of document.querySelectorAll("[data-by]")) {
  button.addEventListener("click", () => {
    state.by = button.dataset.by;
    for (const other of document.querySelectorAll("[data-by]")) other.setAttribute("aria-pressed", String(other === button));
    show();
  });
}
$("whole").addEventListener("click", () => setRegion(null));
$("opacity").addEventListener("input", () => document.documentElement.style.setProperty("--opacity", $("opacity").value / 100));
$("find-concept").addEventListener("input", () => { state.rows = ROWS; showConcepts(); });
$("more-concepts").addEventListener("click", () => { state.rows += 100; showConcepts(); });
$("more-classes").addEventListener("click", () => { state.classes = Infinity; $("more-classes").hidden = true; showClasses(); });
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("python").textContent);
    $("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("python")); // a frame may not write: the text is selected instead
    $("copy").textContent = "Selected";
  }
  setTimeout(() => { $("copy").textContent = "Copy"; }, 2000);
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input[type=search], select, textarea");
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z" && !typing) {
    event.preventDefault();
    undo();
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const tools = { 1: "point", 2: "box", 3: "brush" };
  if (tools[event.key]) setTool(tools[event.key]);
  else if (event.key === "u") undo();
  else if (event.key === "m") { state.map = !state.map; showPixels(); }
  else if (event.key === "Escape") {
    const before = gesture ? gesture.old : null; // a drag is given up, and what was marked before it stays
    gesture = null;
    setRegion(before);
  }
  else if (event.key === "[" || event.key === "]") {
    const visible = [...$("strip").children].map((one) => Number(one.dataset.index));
    const next = visible[visible.indexOf(state.image) + (event.key === "]" ? 1 : -1)];
    if (next !== undefined) setImage(next);
  }
});
// Edits live in the page alone: closing it asks first.
window.addEventListener("beforeunload", (event) => {
  if ([...own.values()].some((one) => one.edits.length)) event.preventDefault();
});
const resized = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    if (contentRect.width) sizes.set(target, contentRect);
  }
  showMarks();
});
for (const id of ["stage", "stage-after"]) resized.observe($(id));

// -------------------------------------------------------------------------------------------------------- filmstrip

const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    target.firstElementChild.src = about.images[Number(target.dataset.index)].thumb;
    watcher.unobserve(target);
  }
}, { root: $("strip"), rootMargin: "0px 600px" });

function frames() {
  const wanted = $("find").value.trim().toLowerCase();
  const [kind, output, concept] = [$("verdict").value, $("of-class").value, $("of-concept").value];
  const found = about.images.map((_, k) => k).filter((k) => {
    const filed = about.images[k];
    const words = [filed.name, filed.label ?? "", about.classes[filed.predicted] ?? "", ...filed.strongest.map((c) => about.concepts[c])];
    return (!kind || filed.verdict === kind)
      && (!output || String(filed.predicted) === output || filed.true.includes(Number(output)))
      && (!concept || filed.strongest.includes(Number(concept)))
      && (!wanted || words.some((word) => word.toLowerCase().includes(wanted)));
  });
  const isWrong = (k) => about.images[k].verdict === "wrong";
  found.sort((a, b) => isWrong(b) - isWrong(a) || a - b);
  $("strip").replaceChildren(...found.map((k) => {
    const filed = about.images[k];
    const picture = make("img", { alt: "", width: filed.thumbSize[0], height: filed.thumbSize[1] });
    if (about.images.length <= LAZY) picture.src = filed.thumb;
    const said = filed.predicted === null ? [] : [make("small", { class: filed.verdict }, make("bdi", {}, about.classes[filed.predicted]))];
    const button = make(
      "button", { type: "button", "data-testid": "image", "data-index": k, "aria-pressed": String(k === state.image) },
      picture, make("span", {}, make("bdi", {}, filed.name)), ...said,
    );
    if (filed.verdict) button.append(make("span", { class: "hidden" }, called[filed.verdict]));
    button.tabIndex = -1;
    button.addEventListener("click", () => setImage(k));
    if (about.images.length > LAZY) watcher.observe(button);
    return button;
  }));
  const current = [...$("strip").children].find((one) => Number(one.dataset.index) === state.image) ?? $("strip").firstElementChild;
  if (current) current.tabIndex = 0;
  const wrong = found.filter(isWrong).length;
  $("count").textContent = `${found.length} of ${about.images.length} images${wrong ? `, ${wrong} ${called.count}, shown first` : ""}`;
  return found;
}

$("strip").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  const all = [...$("strip").children];
  const here = all.indexOf(document.activeElement);
  const next = event.key === "Home" ? all[0] : event.key === "End" ? all.at(-1) : step && all[here + step];
  if (!next) return;
  event.preventDefault();
  all.forEach((one) => { one.tabIndex = one === next ? 0 : -1; });
  next.focus();
});

function options(select, names, numbers) {
  select.append(...numbers.map((k) => make("option", { value: k }, names[k])));
  select.closest("label").hidden = numbers.length < 2;
}

function begin() {
  document.title = about.title;
  $("title").replaceChildren(make("bdi", {}, about.title));
  $("method").textContent = [about.method, `${about.images.length} image${about.images.length === 1 ? "" : "s"}`, `${about.concepts.length} concept${about.concepts.length === 1 ? "" : "s"}`].filter(Boolean).join(" · ");
  $("trust").textContent = `Trust: ${about.trust}`;
  $("trust").hidden = !about.trust;
  const outputs = [...new Set(about.images.flatMap((filed) => [filed.predicted, ...filed.true]))]
    .filter((k) => k !== null && k < about.classes.length).sort((a, b) => a - b);
  const strongest = [...new Set(about.images.flatMap((filed) => filed.strongest))];
  options($("of-class"), about.classes, outputs);
  options($("of-concept"), about.concepts, strongest.sort((a, b) => about.concepts[a].localeCompare(about.concepts[b])));
  $("verdict").closest("label").hidden = !about.images.some((filed) => filed.verdict);
  if (!about.predicts) for (const option of $("verdict").options) option.textContent = called[option.value] ?? "all images";
  document.querySelector(".film").hidden = about.images.length < 2;
  for (const id of ["find", "verdict", "of-class", "of-concept"]) $(id).addEventListener("input", frames);
  $("why").textContent = about.why;
  $("why").hidden = !about.why;
  $("editing").hidden = !about.editable;
  if (!about.editable) $("edit-title").textContent = "Why concepts cannot be changed here";
  const ramp = $("ramp").getContext("2d");
  const colors = new ImageData(256, 1);
  colors.data.set(palette.map((value, k) => (k % 4 === 3 ? 255 : value)));
  ramp.putImageData(colors, 0, 0);
  setTool("box");
  const found = frames();
  setImage(found[0] ?? 0);
}

begin();
