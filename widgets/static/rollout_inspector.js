// Rollouts beside the target. Python sends columns (`columns`); filters, order, selection and pins go both ways. This file ties
// the fields, the keys and the parts together: rollout_data.js knows what is shown, rollout_list.js and rollout_detail.js draw.

import { bestRows, shownRows, unpackRollouts } from "./rollout_data.js";
import { drawCompared, drawDetail, drawHistogram, drawTableF1 } from "./rollout_detail.js";
import { describe, nextSort, rolloutList } from "./rollout_list.js";
import { button, clamp, extent, follow, format, html, inFrames, put, rootOf, svg, takeKey, unpacked } from "./shared.js";

const MOST_COMPARED = 8;
const TEXT_LABELS = { text: "Rollout contains", target: "Reference contains" };
const KEYS = [
  ["↑ ↓", "select"],
  ["Page Up/Down, Home, End", "jump"],
  ["Enter", "pin"],
  ["f or /", "filter"],
  ["Esc", "clear the field; in the list, clear filters, then pins, then the selection"],
];
let made = 0;

// -- the filters' fields ----------------------------------------------------------------------------------------------

/** Fields for the filters; `read()` gives them, `write(filters)` fills them in, `hint(data)` shows what there is. */
function filterFields(parent, ranges, changed) {
  const form = html("div", "filters", parent);
  form.setAttribute("role", "search");
  form.setAttribute("aria-label", "Filter rollouts");
  const texts = new Map();
  const bounds = new Map();
  const field = (box, type, key, label) => {
    const input = html("input", "", box);
    Object.assign(input, { type, step: "any", spellcheck: false });
    input.dataset.filter = key;
    if (label) input.setAttribute("aria-label", label);
    input.addEventListener("input", changed);
    return input;
  };
  for (const [name, heading] of Object.entries(TEXT_LABELS)) {
    const label = html("label", "words", form);
    html("span", "", label, heading);
    texts.set(name, field(label, "text", name));
  }
  for (const { name, label } of ranges) {
    const box = html("div", "range", form);
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
    const fill = (input, now, value) => now !== value && (input.value = value ?? ""); // a half-written number stays
    for (const [name, input] of texts) fill(input, input.value, filters[name] ?? "");
    for (const [name, pair] of bounds) range(pair).forEach((now, i) => fill(pair[i], now, filters[name]?.[i] ?? null));
  };
  const hint = (data) => {
    for (const [name, pair] of bounds) {
      const found = extent([data.numbers[name] ?? data[name]], 0, false);
      const digits = name in data.numbers ? 100 : 1; // rounded outwards
      pair[0].placeholder = found ? `≥ ${Math.floor(found[0] * digits) / digits}` : "";
      pair[1].placeholder = found ? `≤ ${Math.ceil(found[1] * digits) / digits}` : "";
    }
  };
  return { first: texts.values().next().value, read, write, hint };
}

function buildHistogram(parent) {
  const figure = html("figure", "rewards", parent);
  svg("svg", { viewBox: "0 0 200 43", preserveAspectRatio: "none", role: "img" }, figure);
  const caption = html("figcaption", "", figure);
  for (let i = 0; i < 3; i++) html("span", "", caption);
  return figure;
}

/** [R] bytes: 1 where a row is among those that the list shows. */
function passing({ data, rows }) {
  const bytes = new Uint8Array(data.rows);
  for (const row of rows) bytes[row] = 1;
  return new DataView(bytes.buffer);
}

// -- the widget -------------------------------------------------------------------------------------------------------

function build(el, fields, actions) {
  const { root, error } = rootOf(el, "rollout-inspector", "Rollout inspector");
  const top = html("div", "top", root);
  const filters = filterFields(top, fields.filter(({ filtered }) => filtered), actions.filter);
  const figure = buildHistogram(top);
  const bar = html("div", "tools", root);
  const status = html("span", "status", bar);
  status.setAttribute("role", "status");
  status.setAttribute("aria-live", "polite");
  const clear = button(bar, "Clear filters", actions.clear);
  const f1 = button(bar, "Export examples (Table F.1)", actions.toggleF1);
  const table = html("section", "table", root);
  table.hidden = true;
  table.setAttribute("aria-label", "Table F.1");
  const body = html("div", "body", root);
  const list = rolloutList(html("div", "list", body), fields, actions);
  const detail = html("section", "detail", body);
  detail.setAttribute("aria-label", "The selected rollout");
  const compared = html("section", "side-by-side", root);
  compared.setAttribute("aria-label", "Pinned rollouts");
  const help = html("div", "help", root);
  for (const [keys, what] of KEYS) {
    html("kbd", "", help, keys);
    html("span", "", help, what);
  }
  const legend = html("div", "help", root);
  html("span", "token match", legend, "token").setAttribute("aria-hidden", true);
  html("span", "", legend, "a dot marks a token that matches the reference; the bar shows the cosine with the reference's hidden state, from the right if negative");
  return { root, error, filters, figure, status, clear, f1, table, list, detail, compared };
}

function render({ model, el }) {
  const fields = model.get("fields");
  const state = { data: unpackRollouts({}), fields, rows: new Int32Array(0), said: "" };
  const name = `rollout-${++made}`;
  const { schedule, cancel } = inFrames(() => draw());
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
      return say(`At most ${MOST_COMPARED} rollouts can be pinned; unpin one first.`);
    },
    filter() {
      model.set("filters", parts.filters.read());
      clearTimeout(saving);
      saving = setTimeout(() => model.save_changes(), 200); // Python needs to know when the typing rests
    },
    clear: () => put(model, "filters", {}),
    toggleF1() {
      parts.table.hidden = !parts.table.hidden;
      parts.f1.setAttribute("aria-expanded", !parts.table.hidden);
      if (parts.table.hidden) parts.f1.focus();
      redraw("table");
    },
  };
  const parts = build(el, fields, actions);
  parts.f1.setAttribute("aria-expanded", false);

  function say(text) {
    state.said = text;
    redraw("status");
  }

  function draw() {
    const now = stale;
    stale = new Set();
    for (const trait of ["selected", "compared", "sort", "filters"]) state[trait] = model.get(trait);
    if (now.has("columns")) takeColumns();
    if (now.has("rows")) state.rows = shownRows(state.data, state.filters, state.sort);
    if (now.has("rows")) {
      parts.list.show(state);
      drawHistogram(parts.figure, state);
      if (model.alone) model.set("passing", passing(state)); // else Python knows
    }
    if (now.has("rows") || now.has("table")) if (!parts.table.hidden) drawTableF1(parts.table, state, { close: actions.toggleF1, say });
    if (now.has("selected")) {
      parts.list.select(state.selected, state.compared);
      if (state.selected >= 0) parts.list.reveal(state.selected);
    }
    if (now.has("selected") || now.has("pins") || now.has("columns")) {
      parts.list.select(state.selected, state.compared);
      drawDetail(parts.detail, state, actions.pin);
      drawCompared(parts.compared, state, actions);
    }
    drawStatus();
  }

  function takeColumns() {
    const data = unpackRollouts(unpacked(model.get("columns")));
    const all = Int32Array.from({ length: data.rows }, (_, row) => row);
    const ranked = data.numbers[fields.find(({ look }) => look === "best").name] ?? [];
    Object.assign(data, { name });
    Object.assign(state, { data, ranked, best: bestRows(data, ranked, all), range: extent([ranked]), most: {} });
    for (const bar of fields.filter(({ look }) => look === "bar")) {
      state.most[bar.name] = Math.max(...(extent([data.numbers[bar.name] ?? []]) ?? [0]).map(Math.abs));
    }
    parts.filters.hint(data);
  }

  function drawStatus() {
    const { data, rows, selected } = state;
    let groups = 0;
    rows.forEach((row, i) => (groups += i === 0 || data.group[row] !== data.group[rows[i - 1]]));
    const some = rows.length === data.rows ? format(data.rows) : `${format(rows.length)} of ${format(data.rows)}`;
    const clicked = new Set([...rows].map((row) => data.group[row]).filter((group) => data.clicked.has(group))).size;
    const apart = clicked ? `, ${format(clicked)} clicked` : "";
    const facts = [`${some} ${data.rows === 1 ? "rollout" : "rollouts"} at ${format(groups)} ${groups === 1 ? "position" : "positions"}${apart}`];
    if (selected >= 0) facts.push(rows.includes(selected) ? `selected: ${describe(data, selected)}` : "the selected rollout is filtered out");
    if (state.said) facts.push(state.said);
    state.said = "";
    const text = facts.join(" · ");
    if (parts.status.textContent !== text) parts.status.textContent = text;
    parts.clear.disabled = Object.keys(state.filters).length === 0;
  }

  function move(by) {
    if (stale.has("rows")) {
      cancel(); // a key that comes before the frame moves among the rows that were asked for
      draw();
    }
    const { rows } = state;
    if (!rows.length) return;
    const at = rows.indexOf(model.get("selected"));
    const to = at < 0 && Number.isFinite(by) && by > 0 ? 0 : (at < 0 ? 0 : at) + by;
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

  const stop = follow(model, {
    columns: () => redraw("columns", "rows"),
    sort: () => redraw("rows", "selected"),
    filters() {
      parts.filters.write(model.get("filters"));
      redraw("rows");
    },
    token() {
      if (model.get("token") > 0) put(model, "filters", { ...model.get("filters"), position: [model.get("token") - 1, model.get("token") - 1] });
    },
    selected: () => redraw("selected"),
    compared: () => redraw("pins"),
    error() {
      parts.error.textContent = model.get("error");
    },
  });

  return () => {
    cancel();
    clearTimeout(saving);
    parts.list.stop();
    stop();
  };
}

export default { render };
