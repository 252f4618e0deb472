// Rollouts beside the target. Python sends the columns; filters, order, selection and pins go both ways. This module has the
// fields, the keys and the state: rollout_data.js filters and sorts, rollout_list.js and rollout_detail.js draw.

import { bestRows, shownRows, unpackRollouts } from "./rollout_data.js";
import { drawCompared, drawDetail, drawHistogram, drawTableF1 } from "./rollout_detail.js";
import { saveFile } from "./download.js";
import { describe, nextSort, rolloutList } from "./rollout_list.js";
import { button, clamp, extent, follow, format, html, inFrames, put, quantity, rootOf, takeKey, unpacked } from "./shared.js";

const MOST_COMPARED = 8;
const TEXT_LABELS = { text: "Rollout contains", target: "Reference contains" };
const KEYS = [
  ["↑ ↓", "select"],
  ["Page Up/Down, Home, End", "jump"],
  ["Enter", "pin"],
  ["f or /", "filter"],
  ["Esc", "clear the field; in the list, clear filters, then pins, then the selection"],
];
const LEGEND =
  "a dot marks a token that matches the reference; " +
  "the bar shows the cosine with the reference's hidden state; a negative bar starts at the right";
const ORDERS = {
  position: ["by position", false],
  best: ["best reward first", true, true],
  worst: ["worst reward first", true, false],
  flat: ["all positions together", true],
};
let made = 0;

// -- the filters' fields ----------------------------------------------------------------------------------------------

/** Fields for the filters: `read()` returns the filters, `write(filters)` fills the fields, `hint(data)` shows their ranges. */
function filterFields(parent, ranges, changed) {
  const form = html("div", { class: "filters", role: "search", "aria-label": "Filter rollouts" }, parent);
  const texts = new Map();
  const bounds = new Map();
  const field = (box, type, name, label = "") => {
    const input = html("input", { type, step: "any", spellcheck: false, "data-filter": name, "aria-label": label }, box);
    input.addEventListener("input", changed);
    return input;
  };
  for (const [name, heading] of Object.entries(TEXT_LABELS)) {
    const label = html("label", "words", form);
    html("span", "", label, heading);
    texts.set(name, field(label, "text", name));
  }
  for (const { name, label } of ranges) {
    const box = html("div", { class: "range", "data-range": name }, form);
    html("span", "", box, label[0].toUpperCase() + label.slice(1));
    const pair = html("div", "", box);
    const low = field(pair, "number", `${name} low`, `lowest ${label}`);
    html("span", "quiet", pair, "–");
    bounds.set(name, [low, field(pair, "number", `${name} high`, `highest ${label}`)]);
  }
  const range = (pair) => pair.map(({ valueAsNumber }) => (Number.isFinite(valueAsNumber) ? valueAsNumber : null));
  const read = () => {
    const filters = {};
    for (const [name, { value }] of texts) if (value) filters[name] = value;
    for (const [name, pair] of bounds) if (range(pair).some((bound) => bound !== null)) filters[name] = range(pair);
    return filters;
  };
  const write = (filters) => {
    const fill = (input, now, value) => now !== value && (input.value = value ?? ""); // a half-typed number stays
    for (const [name, input] of texts) fill(input, input.value, filters[name] ?? "");
    for (const [name, pair] of bounds) range(pair).forEach((now, i) => fill(pair[i], now, filters[name]?.[i] ?? null));
  };
  const hint = (data) => {
    for (const [name, [low, high]] of bounds) {
      const range = extent([data.numbers[name] ?? data[name]], 0, false);
      const digits = name in data.numbers ? 100 : 1; // rounded outwards
      low.placeholder = range ? `≥ ${Math.floor(range[0] * digits) / digits}` : "";
      high.placeholder = range ? `≤ ${Math.ceil(range[1] * digits) / digits}` : "";
    }
  };
  return { first: form.querySelector("input"), read, write, hint };
}

/** The column by which rollouts are ranked. */
const rankedColumn = (fields) => fields.find(({ look }) => look === "best").name;

/** The name in `ORDERS` of an order. */
function orderOf({ flat, sort: [column, descending] }, ranked) {
  if (!flat) return "position";
  if (column !== ranked) return "flat";
  return descending ? "best" : "worst";
}

// -- the widget -------------------------------------------------------------------------------------------------------

function build(el, fields, actions) {
  const { root, error } = rootOf(el, "rollout-inspector", "Rollout inspector");
  const top = html("div", "top", root);
  const filters = filterFields(top, fields.filter(({ filtered }) => filtered), actions.filter);
  const figure = html("figure", "rewards", top);
  const bar = html("div", "tools", root);
  const status = html("span", { class: "status", role: "status", "aria-live": "polite" }, bar);
  const order = html("select", { "aria-label": "Order of the rollouts" }, html("label", "", bar, "order "));
  for (const [name, [text]] of Object.entries(ORDERS)) html("option", { value: name }, order, text);
  order.addEventListener("change", () => actions.order(order.value));
  const clear = button(bar, "Clear filters", actions.clear);
  const files = ["csv", "parquet"].map((kind) =>
    button(bar, kind === "csv" ? "CSV" : "Parquet", () => actions.download(kind), { title: "Download the rollouts that pass the filters" }),
  );
  const f1 = button(bar, "Export examples (Table F.1)", actions.toggleF1, { "aria-expanded": false });
  const table = html("section", { class: "table", hidden: true, "aria-label": "Table F.1" }, root);
  const body = html("div", "body", root);
  const list = rolloutList(html("div", "list", body), fields, actions);
  const detail = html("section", { class: "detail", "aria-label": "The selected rollout" }, body);
  const compared = html("section", { class: "side-by-side", "aria-label": "Pinned rollouts" }, root);
  const help = html("div", "help", root);
  for (const [keys, action] of KEYS) {
    html("kbd", "", help, keys);
    html("span", "", help, action);
  }
  html("span", { class: "token match", "aria-hidden": true }, help, "token");
  html("span", "", help, LEGEND);
  return { root, error, filters, figure, status, order, clear, files, f1, table, list, detail, compared };
}

function render({ model, el }) {
  const fields = model.get("fields");
  const state = { data: unpackRollouts({}), fields, rows: new Int32Array(0), message: "" };
  const name = `rollout-${++made}`;
  const schedule = inFrames(draw);
  let stale = new Set();
  let saving = 0;

  const redraw = (...parts) => {
    for (const part of parts) stale.add(part);
    schedule();
  };
  const actions = {
    choose: (row) => put(model, "selected", row),
    sort: (column) => put(model, "sort", nextSort(model.get("sort"), column)),
    pin(row) {
      const now = model.get("compared");
      if (now.includes(row)) return put(model, "compared", now.filter((other) => other !== row));
      if (now.length < MOST_COMPARED) return put(model, "compared", [...now, row]);
      return announce(`At most ${MOST_COMPARED} rollouts can be pinned; unpin one first.`);
    },
    filter() {
      model.set("filters", parts.filters.read());
      clearTimeout(saving);
      saving = setTimeout(() => model.save_changes(), 200); // to Python when the typing pauses
    },
    clear: () => put(model, "filters", {}),
    order(name) {
      const [, flat, descending] = ORDERS[name];
      model.set("flat", flat);
      const other = flat ? model.get("sort") : ["row", false];
      put(model, "sort", descending === undefined ? other : [rankedColumn(fields), descending]);
    },
    download: (kind) => model.send({ download: kind }),
    toggleF1() {
      parts.table.hidden = !parts.table.hidden;
      parts.f1.setAttribute("aria-expanded", !parts.table.hidden);
      if (parts.table.hidden) parts.f1.focus();
      redraw("table");
    },
  };
  const parts = build(el, fields, actions);

  function announce(message) {
    state.message = message;
    redraw("status");
  }

  function draw() {
    const now = stale;
    stale = new Set();
    for (const trait of ["selected", "compared", "sort", "filters", "flat"]) state[trait] = model.get(trait);
    if (now.has("columns")) takeColumns();
    if (now.has("rows")) {
      state.rows = shownRows(state.data, state.filters, state.sort, state.flat);
      parts.order.value = orderOf(state, rankedColumn(fields));
      parts.list.show(state);
      drawHistogram(parts.figure, state);
      if (model.alone) {
        const passing = new Uint8Array(state.data.rows); // 1 for the rows in the list; else Python computes it
        for (const row of state.rows) passing[row] = 1;
        model.set("passing", new DataView(passing.buffer));
      }
    }
    if (!parts.table.hidden && (now.has("rows") || now.has("table"))) {
      drawTableF1(parts.table, state, { close: actions.toggleF1, announce });
    }
    if (now.has("selected") || now.has("pins") || now.has("columns")) {
      parts.list.select(state.selected, state.compared);
      if (now.has("selected") && state.selected >= 0) parts.list.reveal(state.selected);
      drawDetail(parts.detail, state, actions.pin);
      drawCompared(parts.compared, state, actions);
    }
    drawStatus();
  }

  function takeColumns() {
    const data = { ...unpackRollouts(unpacked(model.get("columns"))), name };
    const all = Int32Array.from({ length: data.rows }, (_, row) => row);
    const column = rankedColumn(fields);
    const ranked = data.numbers[column] ?? [];
    const most = (name) => Math.max(...(extent([data.numbers[name] ?? []]) ?? [0]).map(Math.abs));
    const bars = fields.filter(({ look }) => look === "bar").map((bar) => [bar.name, most(bar.name)]);
    Object.assign(state, { data, ranked, best: bestRows(data, ranked, all), range: extent([ranked]) });
    state.most = Object.fromEntries(bars);
    const equal = (values) => data.rows > 0 && ranked.every((value, row) => Object.is(value, values?.[row]));
    const repeated = fields.filter(({ name: other, shared }) => !shared && other !== column && equal(data.numbers[other]));
    state.hidden = new Set([...repeated.map((field) => field.name), ...(data.explored ? ["step"] : [])]);
    parts.filters.hint(data);
    parts.root.querySelector("[data-range=step]").hidden = data.explored;
  }

  function drawStatus() {
    const { data, rows, selected, message } = state;
    const groups = new Set(rows.map((row) => data.group[row]));
    const some = rows.length === data.rows ? "" : `${format(rows.length)} of `;
    const clicked = [...groups].filter((group) => data.clicked.has(group)).length;
    const apart = clicked ? `, ${format(clicked)} clicked` : "";
    for (const file of parts.files) Object.assign(file, { disabled: !rows.length, hidden: model.alone === true });
    const facts = [`${some}${quantity(data.rows, "rollout")} at ${quantity(groups.size, "position")}${apart}`];
    const where = rows.includes(selected) ? `selected: ${describe(data, selected)}` : "the selected rollout is filtered out";
    if (selected >= 0) facts.push(where);
    if (message) facts.push(message);
    state.message = "";
    const text = facts.join(" · ");
    if (parts.status.textContent !== text) parts.status.textContent = text;
    parts.clear.disabled = Object.keys(state.filters).length === 0;
  }

  /** Says in the status how many rollouts a page without Python has of a clicked position; returns whether it has any. */
  function answerAlone(position) {
    const { data } = state;
    const count = data.group.reduce((sum, group) => sum + (data.position[group] === position), 0);
    const answer = count ? `${quantity(count, "rollout")}, in the list below` : "this saved page has no rollouts there, only those of the positions marked ◆";
    model.set("status", `Token ${format(position + 1)}: ${answer}.`);
    return count > 0;
  }

  function move(by) {
    if (stale.has("rows")) {
      schedule.cancel(); // a key before the next frame moves among the rows of the new filters
      draw();
    }
    const { rows } = state;
    if (!rows.length) return;
    const at = rows.indexOf(model.get("selected"));
    const to = at < 0 && by !== Infinity && by > 0 ? 0 : Math.max(at, 0) + by;
    actions.choose(rows[clamp(to, 0, rows.length - 1)]);
  }

  function escape(event) {
    if (event.target.matches("input")) {
      event.target.value = "";
      actions.filter();
      parts.list.box.focus({ preventScroll: true });
    } else if (event.target.closest(".table")) actions.toggleF1();
    else if (Object.keys(model.get("filters")).length) actions.clear();
    else if (model.get("compared").length) put(model, "compared", []);
    else put(model, "selected", -1);
  }

  function onKey(event) {
    const typing = event.target.matches("input");
    if (typing) event.stopPropagation(); // JupyterLab would act on the keys too
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = parts.list.page();
    const moves = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity };
    const inList = event.target === parts.list.box;
    if (event.key === "Escape") escape(event);
    else if (!typing && (event.key === "f" || event.key === "/")) parts.filters.first.focus();
    else if (inList && event.key in moves) move(moves[event.key]);
    else if (inList && event.key === "Enter" && model.get("selected") >= 0) actions.pin(model.get("selected"));
    else if (typing && event.key === "Enter") parts.list.box.focus({ preventScroll: true });
    else return;
    takeKey(event);
  }
  parts.root.addEventListener("keydown", onKey);

  const listeners = {
    columns: () => redraw("columns", "rows"),
    sort: () => redraw("rows", "selected"),
    flat: () => redraw("rows", "selected"),
    filters() {
      parts.filters.write(model.get("filters"));
      redraw("rows");
    },
    token() {
      const position = model.get("token") - 1;
      if (position < 0 || (model.alone && !answerAlone(position))) return;
      put(model, "filters", { ...model.get("filters"), position: [position, position] });
    },
    selected: () => redraw("selected"),
    compared: () => redraw("pins"),
    error: parts.error,
  };
  const receive = ({ file }, [data]) => file && saveFile(data, file);
  model.on("msg:custom", receive);
  const deaf = () => model.off("msg:custom", receive);
  return follow(model, listeners, deaf, schedule.cancel, () => clearTimeout(saving), ...parts.list.ends);
}

export default { render };
