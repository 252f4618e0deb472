// States along a document: one strip per head, coloured by one of three measures; below, bars with the write strength or the
// long-short difference of every token.

import { button, clamp, counts, extent, floats, follow, format, html, inFrames, onTheme, onWidth } from "./shared.js";
import { prepared, put, rootOf, takeKey, tickTexts, ticks, unpacked } from "./shared.js";

const ROW = 16;
const LABEL = 150;
const WRITES = 84;
const PALE = " (bars: mean of neighbouring tokens; pale: highest)";

/** Index of the place that a share of the width falls on. */
export const placeAt = (share, places) => clamp(Math.floor(share * places), 0, places - 1);

/** Highest value and mean in each of `columns` equal parts of `values`, which are at least as many. */
export function spans(values, columns) {
  const [highest, means] = [new Float32Array(columns), new Float32Array(columns)];
  for (let column = 0; column < columns; column++) {
    const [from, to] = [column, column + 1].map((edge) => Math.floor((edge * values.length) / columns));
    const part = values.subarray(from, Math.max(to, from + 1));
    highest[column] = Math.max(...part);
    means[column] = part.reduce((sum, value) => sum + value, 0) / part.length;
  }
  return { highest, means };
}

/** Number of bars for `count` values in a width in pixels: one each, or as many as leave a gap between them. */
export const barsIn = (width, count) => Math.max(Math.floor(Math.min(width / 4, count)), 1);

/** Ends of an axis on which the values differ visibly: from 0, unless all values lie near the highest. */
export function axisOf(values) {
  const [low, high] = extent([values], 0, false) ?? [0, 1];
  if (low > 0.4 * high && high > low) return [low - 0.08 * (high - low), high];
  return [Math.min(low, 0), high > 0 ? high : 1];
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "state-view", "States along the document");
  const bar = html("div", "bar", root);
  const choice = html("select", "", html("label", "", bar, "Colour by "));
  const legend = html("span", "legend", bar);
  const status = html("div", { class: "status", role: "status" }, root);
  const keys = "Heads by positions: arrow keys move, Home and End go to the ends of the document";
  const canvas = html("canvas", { class: "strips", tabindex: 0, role: "application", "aria-label": keys }, root);
  const below = html("div", "bar", root);
  const bars = html("select", "", html("label", "", below, "Bars: "));
  const title = html("div", "title", root);
  const writes = html("canvas", { class: "writes", role: "img" }, root);
  const strongest = html("ol", "strongest", root);
  let data = null;

  function unpack() {
    const states = unpacked(model.get("states"));
    data = null;
    schedule();
    if (!states.rows?.length) return;
    const measures = states.measures.map((measure) => ({ ...measure, values: floats(measure.values) }));
    data = { ...states, places: counts(states.places), measures, writes: floats(states.writes) };
    data.longShort = states.long_short ? floats(states.long_short) : null;
    choice.replaceChildren();
    for (const { name, title, help } of measures) html("option", { value: name, title: help ?? "" }, choice, title);
    bars.replaceChildren();
    for (const { name, title, help } of states.bars) html("option", { value: name, title: help }, bars, title);
  }

  const currentMeasure = () => data.measures.find(({ name }) => name === model.get("measure"));
  const column = () => {
    const place = model.get("place");
    return place < 0 ? data.places.length - 1 : data.places.findLastIndex((at) => at <= place);
  };

  function sized(target, height, style) {
    const width = Math.max(root.clientWidth || 600, 320);
    return { pen: Object.assign(prepared(target, width, height), { font: `12px ${style.fontFamily}` }), width };
  }

  function drawStrips(style, colour) {
    const { rows, places } = data;
    const { pen, width } = sized(canvas, rows.length * ROW + 18, style);
    const measure = currentMeasure();
    const range = extent([measure.values]) ?? [0, 1];
    const low = range[0];
    const wide = (width - LABEL) / places.length;
    Object.assign(pen, { textBaseline: "middle", textAlign: "left" }); // an earlier drawing ended with "right"
    rows.forEach((row, i) => {
      pen.globalAlpha = 1;
      pen.fillStyle = colour(i === model.get("row") ? "--accent" : "--quiet");
      pen.fillText(`layer ${row.layer} ${row.name === "recurrent_state" ? "state" : row.name} head ${row.head}`, 2, i * ROW + ROW / 2, LABEL - 8);
      pen.fillStyle = colour("--series-1");
      for (let p = 0; p < places.length; p++) {
        const value = measure.values[i * places.length + p];
        if (!Number.isFinite(value)) continue;
        pen.globalAlpha = 0.08 + 0.92 * ((value - low) / (range[1] - low));
        const [left, right] = [p, p + 1].map((edge) => Math.round(LABEL + edge * wide)); // whole pixels leave no seams
        pen.fillRect(left, i * ROW + 1, right - left, ROW - 2);
      }
    });
    pen.globalAlpha = 1;
    Object.assign(pen, { strokeStyle: colour("--accent"), lineWidth: 2, fillStyle: colour("--quiet") });
    pen.strokeRect(LABEL + column() * wide, model.get("row") * ROW + 1, Math.max(wide, 3), ROW - 2);
    pen.fillText("token 0", LABEL, rows.length * ROW + 9);
    pen.textAlign = "right";
    pen.fillText(`token ${format(places.at(-1))}`, width - 2, rows.length * ROW + 9);
    legend.textContent = `${format(low)} (faint) to ${format(range[1])} (strong), ${measure.unit}`;
  }

  /** Values of every token, the largest of them, and a heading; without values only the heading. */
  function barsOf(row) {
    if (model.get("bars") === "long_short" && data.longShort) {
      const heading = `Long-short difference of every token in nats${PALE}; largest:`;
      return { values: data.longShort, largest: data.largest, heading };
    }
    if (row.writes < 0) return { heading: "This layer does not report write strengths." };
    const values = data.writes.subarray(row.writes * data.tokens, (row.writes + 1) * data.tokens);
    const heading = `Write strength of every token in layer ${row.layer}, head ${row.head}${PALE}; strongest tokens:`;
    return { values, largest: row.strongest, heading };
  }

  function drawBars(style, colour) {
    const { values: strengths, largest, heading } = barsOf(data.rows[model.get("row")]);
    const { pen, width } = sized(writes, WRITES, style);
    title.textContent = heading;
    if (!strengths) return;
    const columns = barsIn(width - LABEL, strengths.length);
    const { highest, means } = spans(strengths, columns);
    const [low, high] = axisOf(strengths);
    const wide = (width - LABEL) / columns;
    const y = (value) => WRITES - 1 - ((value - low) / (high - low)) * (WRITES - 14);
    pen.fillStyle = colour("--series-1");
    const bar = (value, i) => pen.fillRect(LABEL + i * wide, y(value), Math.max(wide - (wide > 3), 1), WRITES - y(value));
    pen.globalAlpha = 0.35;
    highest.forEach(bar);
    pen.globalAlpha = 1;
    means.forEach(bar);
    const rows = ticks(low, high, 3).filter((tick) => y(tick) > 4);
    Object.assign(pen, { textAlign: "right", textBaseline: "middle" });
    tickTexts(rows).forEach((text, i) => {
      pen.fillStyle = colour("--quiet");
      pen.fillText(text, LABEL - 8, Math.min(y(rows[i]), WRITES - 7));
      pen.fillStyle = colour("--grid");
      pen.fillRect(LABEL - 4, y(rows[i]), 4, 1);
    });
    writes.setAttribute("aria-label", heading);
    for (const { token, text, strength } of largest) {
      const item = html("li", "", strongest);
      button(item, text || "part of a character", () => put(model, "place", token));
      html("span", "", item, ` token ${format(token)}: ${format(strength)}`);
    }
  }

  function draw() {
    error.textContent = model.get("error");
    canvas.hidden = writes.hidden = bar.hidden = !data;
    below.hidden = !data?.longShort;
    strongest.replaceChildren();
    if (!data) {
      status.textContent = model.get("status");
      title.textContent = model.get("status") || model.get("error") ? "" : "No states yet.";
      return;
    }
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    choice.value = model.get("measure");
    choice.title = currentMeasure().help ?? "";
    bars.value = model.get("bars");
    drawStrips(style, colour);
    drawBars(style, colour);
    const [row, measure] = [data.rows[model.get("row")], currentMeasure()];
    const value = measure.values[model.get("row") * data.places.length + column()];
    const where = `in layer ${row.layer}, ${row.name}, head ${row.head}, after token ${format(data.places[column()])}`;
    status.textContent = `${measure.title} ${where}: ${Number.isFinite(value) ? format(value) : "none"}`;
  }

  const schedule = inFrames(draw);
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
    const moves = { ArrowUp: [row - 1, at], ArrowDown: [row + 1, at], ArrowLeft: [row, at - 1], ArrowRight: [row, at + 1] };
    const [toRow, to] = { ...moves, Home: [row, 0], End: [row, Infinity] }[event.key] ?? [];
    if (to === undefined) return;
    takeKey(event);
    put(model, "row", clamp(toRow, 0, data.rows.length - 1));
    put(model, "place", data.places[clamp(to, 0, data.places.length - 1)]);
  }

  choice.addEventListener("change", () => put(model, "measure", choice.value));
  bars.addEventListener("change", () => put(model, "bars", bars.value));
  canvas.addEventListener("pointerdown", onPointer);
  canvas.addEventListener("keydown", onKey);
  const traits = ["status", "error", "measure", "bars", "row", "place"];
  const listeners = { states: unpack, ...Object.fromEntries(traits.map((trait) => [trait, schedule])) };
  return follow(model, listeners, onWidth(root, schedule), onTheme(root, schedule), schedule.cancel);
}

export default { render };
