// States along a document: a strip a head, coloured by one of three measures; below, how strongly each token writes.

import { button, clamp, counts, extent, floats, follow, format, html, inFrames, onWidth, prepared, put, rootOf, takeKey, unpacked } from "./shared.js";

const ROW = 16;
const LABEL = 150;
const WRITES = 70;

/** Index of the place that a share of the width falls on. */
export function placeAt(share, places) {
  return clamp(Math.floor(share * places), 0, places - 1);
}

/** Highest value of every one of `columns` stretches of `values`; fewer columns than values. */
export function peaks(values, columns) {
  const found = new Float32Array(columns);
  for (let column = 0; column < columns; column++) {
    const [from, to] = [column, column + 1].map((edge) => Math.floor((edge * values.length) / columns));
    for (let i = from; i < Math.max(to, from + 1); i++) found[column] = Math.max(found[column], values[i] ?? 0);
  }
  return found;
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "state-view", "States along the document");
  const bar = html("div", "bar", root);
  const choice = html("select", "", html("label", "", bar, "Colour by "));
  const legend = html("span", "legend", bar);
  const status = html("div", "status", root);
  status.setAttribute("role", "status");
  const canvas = html("canvas", "strips", root);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", "Heads by positions: arrow keys move, Home and End go to the ends of the document");
  const title = html("div", "title", root);
  const writes = html("canvas", "writes", root);
  writes.setAttribute("role", "img");
  const strongest = html("ol", "strongest", root);
  let data = null;

  function unpack() {
    const states = unpacked(model.get("states"));
    data = null;
    if (!states.rows?.length) return;
    const places = counts(states.places);
    const measures = states.measures.map((measure) => ({ ...measure, values: floats(measure.values) }));
    data = { ...states, places, measures, writes: floats(states.writes) };
    choice.replaceChildren();
    for (const measure of measures) {
      const option = html("option", "", choice, measure.title);
      option.value = measure.name;
    }
  }

  const measureNow = () => data.measures.find(({ name }) => name === model.get("measure"));
  const column = () => {
    const place = model.get("place");
    return place < 0 ? data.places.length - 1 : data.places.findLastIndex((at) => at <= place);
  };

  function sized(target, height) {
    const width = Math.max(root.clientWidth || 600, 320);
    return { pen: prepared(target, width, height), width };
  }

  function colours() {
    const style = getComputedStyle(root);
    const value = (name) => style.getPropertyValue(name).trim();
    return { ink: value("--ink"), quiet: value("--quiet"), accent: value("--accent"), strip: value("--strip"), font: style.fontFamily };
  }

  function drawStrips(palette) {
    const { rows, places } = data;
    const { pen, width } = sized(canvas, rows.length * ROW + 18);
    const measure = measureNow();
    const range = extent([measure.values]) ?? [0, 1];
    const low = Math.min(range[0], 0);
    const wide = (width - LABEL) / places.length;
    pen.font = `12px ${palette.font}`;
    pen.textBaseline = "middle";
    rows.forEach((row, i) => {
      pen.globalAlpha = 1;
      pen.fillStyle = i === model.get("row") ? palette.accent : palette.quiet;
      pen.fillText(`layer ${row.layer} ${row.name === "recurrent_state" ? "state" : row.name} head ${row.head}`, 2, i * ROW + ROW / 2, LABEL - 8);
      pen.fillStyle = palette.strip;
      for (let p = 0; p < places.length; p++) {
        const value = measure.values[i * places.length + p];
        if (!Number.isFinite(value)) continue;
        pen.globalAlpha = 0.06 + 0.94 * ((value - low) / (range[1] - low));
        pen.fillRect(LABEL + p * wide, i * ROW + 1, Math.ceil(wide), ROW - 2);
      }
    });
    pen.globalAlpha = 1;
    pen.strokeStyle = palette.accent;
    pen.lineWidth = 2;
    pen.strokeRect(LABEL + column() * wide, model.get("row") * ROW + 1, Math.max(wide, 3), ROW - 2);
    pen.fillStyle = palette.quiet;
    pen.fillText("token 0", LABEL, rows.length * ROW + 9);
    pen.textAlign = "right";
    pen.fillText(`token ${format(places[places.length - 1])}`, width - 2, rows.length * ROW + 9);
    legend.textContent = `${format(low)} (pale) to ${format(range[1])} (full), ${measure.unit}`;
  }

  function drawWrites(palette) {
    const row = data.rows[model.get("row")];
    const { pen, width } = sized(writes, WRITES);
    strongest.replaceChildren();
    if (row.writes < 0) {
      title.textContent = "This layer does not report write strengths.";
      return;
    }
    const own = data.writes.subarray(row.writes * data.tokens, (row.writes + 1) * data.tokens);
    const wide = Math.floor(Math.min(width - LABEL, own.length));
    const highest = peaks(own, wide);
    const most = Math.max(...highest) || 1;
    pen.fillStyle = palette.strip;
    highest.forEach((value, i) => {
      const x = LABEL + (i * (width - LABEL)) / wide;
      pen.fillRect(x, WRITES - (value / most) * (WRITES - 4), Math.max((width - LABEL) / wide, 1), (value / most) * (WRITES - 4));
    });
    pen.font = `12px ${palette.font}`;
    pen.fillStyle = palette.quiet;
    pen.fillText(format(most), 2, 12, LABEL - 8);
    pen.fillText("0", 2, WRITES - 4, LABEL - 8);
    title.textContent = `Write strength of every token in layer ${row.layer}, head ${row.head}; strongest tokens:`;
    writes.setAttribute("aria-label", title.textContent);
    for (const { token, text, strength } of row.strongest) {
      const item = html("li", "", strongest);
      button(item, text || "part of a character", () => put(model, "place", token));
      html("span", "", item, ` token ${format(token)}: ${format(strength)}`);
    }
  }

  function draw() {
    canvas.hidden = writes.hidden = bar.hidden = !data;
    if (!data) {
      title.textContent = model.get("status") || model.get("error") ? "" : "No states yet.";
      strongest.replaceChildren();
      return;
    }
    const palette = colours();
    choice.value = model.get("measure");
    drawStrips(palette);
    drawWrites(palette);
    const [row, measure] = [data.rows[model.get("row")], measureNow()];
    const value = measure.values[model.get("row") * data.places.length + column()];
    const place = data.places[column()];
    status.textContent = `${measure.title} in layer ${row.layer}, ${row.name}, head ${row.head}, after token ${format(place)}: ${Number.isFinite(value) ? format(value) : "none"}`;
  }

  const { schedule, cancel } = inFrames(draw);
  function onPointer(event) {
    if (!data) return;
    const box = canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / ROW);
    if (row >= 0 && row < data.rows.length) put(model, "row", row);
    const share = (event.clientX - box.left - LABEL) / (box.width - LABEL);
    if (share >= 0) put(model, "place", data.places[placeAt(share, data.places.length)]);
  }
  function onKey(event) {
    if (!data) return;
    const [row, at] = [model.get("row"), column()];
    const moves = { ArrowUp: [row - 1, at], ArrowDown: [row + 1, at], ArrowLeft: [row, at - 1], ArrowRight: [row, at + 1], Home: [row, 0], End: [row, data.places.length - 1] };
    if (!(event.key in moves)) return;
    takeKey(event);
    const [toRow, to] = moves[event.key];
    put(model, "row", clamp(toRow, 0, data.rows.length - 1));
    put(model, "place", data.places[clamp(to, 0, data.places.length - 1)]);
  }

  const onStates = () => {
    unpack();
    schedule();
  };
  const onText = () => {
    error.textContent = model.get("error");
    if (!data) status.textContent = model.get("status");
    schedule();
  };
  choice.addEventListener("change", () => put(model, "measure", choice.value));
  canvas.addEventListener("pointerdown", onPointer);
  canvas.addEventListener("keydown", onKey);
  const drawn = { measure: schedule, row: schedule, place: schedule };
  const stops = [follow(model, { states: onStates, status: onText, error: onText, ...drawn }), onWidth(root, schedule), cancel];
  return () => stops.forEach((stop) => stop());
}

export default { render };
