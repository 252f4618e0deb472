// Rollouts beside the truth. Python sends columns (`columns`); filters, order, selection and pins go both ways. This file ties
// the fields, the keys and the parts together: rollout_data.js knows what is shown, rollout_list.js and rollout_detail.js draw.

import { bestRows, FILTER_RANGES, FILTER_TEXTS, shownRows, unpackRollouts } from "./rollout_data.js";
import { drawCompared, drawDetail, drawHistogram, drawTableF1 } from "./rollout_detail.js";
import { describe, nextSort, rolloutList } from "./rollout_list.js";
import { extent, format, html, svg, unpacked } from "./shared.js";

const MOST_COMPARED = 8;
const TEXT_LABELS = { text: "Rollout contains", truth: "Reference contains" };
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
function filterFields(parent, changed) {
  const form = html("div", "filters", parent);
  form.setAttribute("role", "search");
  form.setAttribute("aria-label", "Filter rollouts");
  const inputs = new Map();
  const field = (box, key, type, label) => {
    const input = html("input", "", box);
    input.type = type;
    input.dataset.filter = key;
    if (type === "number") input.step = "any";
    if (label) input.setAttribute("aria-label", label);
    input.addEventListener("input", changed);
    inputs.set(key, input);
  };
  for (const name of FILTER_TEXTS) {
    const label = html("label", "words", form);
    html("span", "", label, TEXT_LABELS[name]);
    field(label, name, "text");
    inputs.get(name).spellcheck = false;
  }
  for (const name of FILTER_RANGES) {
    const box = html("div", "range", form);
    html("span", "", box, name[0].toUpperCase() + name.slice(1));
    const pair = html("div", "", box);
    field(pair, `${name} low`, "number", `lowest ${name}`);
    html("span", "quiet", pair, "–");
    field(pair, `${name} high`, "number", `highest ${name}`);
  }
  const number = (key) => (Number.isFinite(inputs.get(key).valueAsNumber) ? inputs.get(key).valueAsNumber : null);
  const read = () => {
    const filters = {};
    for (const name of FILTER_TEXTS) if (inputs.get(name).value) filters[name] = inputs.get(name).value;
    for (const name of FILTER_RANGES) {
      const bounds = [number(`${name} low`), number(`${name} high`)];
      if (bounds.some((bound) => bound !== null)) filters[name] = bounds;
    }
    return filters;
  };
  const write = (filters) => {
    const now = read();
    for (const name of FILTER_TEXTS) if ((now[name] ?? "") !== (filters[name] ?? "")) inputs.get(name).value = filters[name] ?? "";
    for (const name of FILTER_RANGES) {
      ["low", "high"].forEach((end, i) => {
        const bound = filters[name]?.[i] ?? null;
        if ((now[name]?.[i] ?? null) !== bound) inputs.get(`${name} ${end}`).value = bound ?? "";
      });
    }
  };
  const hint = (data) => {
    for (const name of FILTER_RANGES) {
      const values = (data.numbers[name] ?? data[name]).filter(Number.isFinite);
      const [low, high] = values.reduce(([least, most], x) => [Math.min(least, x), Math.max(most, x)], [Infinity, -Infinity]);
      const digits = name in data.numbers ? 100 : 1; // rounded outwards
      inputs.get(`${name} low`).placeholder = values.length ? `≥ ${Math.floor(low * digits) / digits}` : "";
      inputs.get(`${name} high`).placeholder = values.length ? `≤ ${Math.ceil(high * digits) / digits}` : "";
    }
  };
  return { form, inputs, read, write, hint };
}

function buildHistogram(parent) {
  const figure = html("figure", "rewards", parent);
  svg("svg", { viewBox: "0 0 200 43", preserveAspectRatio: "none", role: "img" }, figure);
  const caption = html("figcaption", "", figure);
  for (let i = 0; i < 3; i++) html("span", "", caption);
  return figure;
}

function button(parent, text, press) {
  const node = html("button", "", parent, text);
  node.type = "button";
  node.addEventListener("click", press);
  return node;
}

/** [R] bytes: 1 where a row is among those that the list shows. */
function passing({ data, rows }) {
  const bytes = new Uint8Array(data.rows);
  for (const row of rows) bytes[row] = 1;
  return new DataView(bytes.buffer);
}

// -- the widget -------------------------------------------------------------------------------------------------------

function build(el, actions) {
  const root = html("div", "refine-lab rollout-inspector", el);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Rollout inspector");
  const error = html("div", "error", root);
  error.setAttribute("role", "alert");
  const top = html("div", "top", root);
  const fields = filterFields(top, actions.filter);
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
  const list = rolloutList(html("div", "list", body), actions);
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
  return { root, error, fields, figure, status, clear, f1, table, list, detail, compared };
}

function render({ model, el }) {
  const state = { data: unpackRollouts({}), rows: new Int32Array(0), said: "" };
  const name = `rollout-${++made}`;
  let stale = new Set();
  let frame = 0;
  let saving = 0;

  const redraw = (...parts) => {
    for (const part of parts) stale.add(part);
    frame ||= requestAnimationFrame(draw);
  };
  const put = (trait, value) => {
    model.set(trait, value);
    model.save_changes();
  };
  const actions = {
    choose: (row) => put("selected", row),
    sort: (column) => put("sort", nextSort(model.get("sort"), column)),
    pin(row) {
      const now = model.get("compared");
      if (now.includes(row)) return put("compared", now.filter((other) => other !== row));
      if (now.length < MOST_COMPARED) return put("compared", [...now, row]);
      return say(`At most ${MOST_COMPARED} rollouts can be pinned; unpin one first.`);
    },
    filter() {
      model.set("filters", parts.fields.read());
      clearTimeout(saving);
      saving = setTimeout(() => model.save_changes(), 200); // Python needs to know when the typing rests
    },
    clear: () => put("filters", {}),
    toggleF1() {
      parts.table.hidden = !parts.table.hidden;
      parts.f1.setAttribute("aria-expanded", !parts.table.hidden);
      if (parts.table.hidden) parts.f1.focus();
      redraw("table");
    },
  };
  const parts = build(el, actions);
  parts.f1.setAttribute("aria-expanded", false);

  function say(text) {
    state.said = text;
    redraw("status");
  }

  function draw() {
    frame = 0;
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
    const advantage = extent([data.numbers.advantage ?? []]);
    Object.assign(data, { name });
    Object.assign(state, { data, best: bestRows(data, all), range: extent([data.numbers.reward ?? []]) });
    state.most = advantage ? Math.max(Math.abs(advantage[0]), Math.abs(advantage[1])) : 0;
    parts.fields.hint(data);
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
      cancelAnimationFrame(frame); // a key that comes before the frame moves among the rows that were asked for
      draw();
    }
    const { rows } = state;
    if (!rows.length) return;
    const at = rows.indexOf(model.get("selected"));
    const to = at < 0 && Number.isFinite(by) && by > 0 ? 0 : (at < 0 ? 0 : at) + by;
    actions.choose(rows[Math.min(Math.max(to, 0), rows.length - 1)]);
  }

  function escape(event) {
    if (event.target.matches("input")) {
      event.target.value = "";
      actions.filter();
      parts.list.box.focus({ preventScroll: true });
    } else if (event.target.closest(".table")) actions.toggleF1();
    else if (Object.keys(model.get("filters")).length) actions.clear();
    else if (model.get("compared").length) put("compared", []);
    else put("selected", -1);
  }

  function onKey(event) {
    const typing = event.target.matches("input");
    if (typing) event.stopPropagation(); // JupyterLab would act on the keys too
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = parts.list.page();
    const moves = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity };
    const inList = event.target === parts.list.box;
    if (event.key === "Escape") escape(event);
    else if (!typing && (event.key === "f" || event.key === "/")) parts.fields.inputs.get("text").focus();
    else if (inList && event.key in moves) move(moves[event.key]);
    else if (inList && event.key === "Enter" && model.get("selected") >= 0) actions.pin(model.get("selected"));
    else if (typing && event.key === "Enter") parts.list.box.focus({ preventScroll: true });
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
  parts.root.addEventListener("keydown", onKey);

  const listeners = {
    columns: () => redraw("columns", "rows"),
    sort: () => redraw("rows", "selected"),
    filters() {
      parts.fields.write(model.get("filters"));
      redraw("rows");
    },
    token() {
      if (model.get("token") > 0) put("filters", { ...model.get("filters"), position: [model.get("token") - 1, model.get("token") - 1] });
    },
    selected: () => redraw("selected"),
    compared: () => redraw("pins"),
    error() {
      parts.error.textContent = model.get("error");
    },
  };
  for (const [trait, listener] of Object.entries(listeners)) model.on(`change:${trait}`, listener);
  for (const listener of Object.values(listeners)) listener();

  return () => {
    cancelAnimationFrame(frame);
    clearTimeout(saving);
    parts.list.stop();
    for (const [trait, listener] of Object.entries(listeners)) model.off(`change:${trait}`, listener);
  };
}

export default { render };
