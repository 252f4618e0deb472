// The run table: a row per run, grouped by experiment. The rows stay the same elements while their texts change, so that
// a click or the focus is never lost to an update.

import { columnsOf, filtered, grouping, nextOrder, sorted, speedText } from "./run_columns.js";
import { button, follow, html, inFrames, keepKeys, put, quantity, rootOf, takeKey } from "./shared.js";
import { colourOf, glyph } from "./series_glyph.js";

const setText = (node, text) => node.textContent !== text && (node.textContent = text);

function labelled(parent, text, model, trait) {
  const label = html("label", "", parent);
  const box = html("input", { type: "checkbox" }, label);
  label.append(text);
  box.addEventListener("change", () => put(model, trait, box.checked));
  return { box, show: () => (box.checked = model.get(trait)), label };
}

/** The names in a trait with some of them put in or taken out. */
function change(model, trait, names, present) {
  const others = model.get(trait).filter((name) => !names.includes(name));
  put(model, trait, present ? [...others, ...names] : others);
}

// -- rows -------------------------------------------------------------------------------------------------------------

function makeRow(model, columns, name) {
  const line = html("tr", { "data-run": name });
  const view = { line, cells: new Map() };
  if (model.get("selectable")) {
    const cell = html("td", "select", line);
    view.box = html("input", { type: "checkbox", "data-key": "select" }, cell);
    view.box.addEventListener("change", () => change(model, "selected", [name], view.box.checked));
    cell.addEventListener("click", ({ target }) => target === cell && view.box.click());
  }
  const hide = () => change(model, "hidden", [name], !model.get("hidden").includes(name));
  view.hide = button(html("td", "", line), "", hide, { "data-key": "hide" });
  if (model.get("opens_memory")) {
    const open = () => put(model, "opened", model.get("opened") === name ? "" : name);
    view.memory = button(html("td", "", line), "", open, { "data-key": "memory", "data-asks": true });
  }
  for (const column of columns) {
    const kind = column.kind ?? (column.number ? "number" : "");
    const cell = html("td", kind, line);
    view.cells.set(column.key, html("span", "", cell));
    if (column.kind === "steps") cell.prepend((view.bar = html("progress", { max: 1 })));
  }
  view.about = html("tr", "about");
  html("td", { colspan: columns.length + 3 }, view.about);
  return view;
}

function fillRow(model, columns, view, row) {
  const [selected, hidden] = ["selected", "hidden"].map((trait) => model.get(trait).includes(row.name));
  const label = `${row.method}, seed ${row.seed}, ${row.name}`;
  for (const column of columns) {
    const node = view.cells.get(column.key);
    setText(node, column.text(row));
    if (column.kind === "setting") node.parentNode.title = `${column.title}: ${column.text(row)}`;
  }
  const state = view.cells.get("state").parentNode;
  state.classList.toggle("bad", row.bad);
  Object.assign(view.bar, { value: row.steps ? row.step / row.steps : 0 });
  view.bar.setAttribute("aria-label", `${label}: steps done`);
  view.bar.parentNode.title = speedText(row);
  const method = view.cells.get("method").parentNode;
  method.title = [row.name, row.about].filter(Boolean).join("\n");
  const look = `${row.look} ${row.symbol}`;
  if (method.dataset.look !== look) {
    method.querySelector("svg")?.remove();
    glyph(method, { colour: colourOf(row.look), symbol: row.symbol });
    method.prepend(method.lastChild);
    method.dataset.look = look;
  }
  view.line.classList.toggle("chosen", selected && model.get("selectable"));
  view.line.classList.toggle("faded", hidden || !selected);
  if (view.box) {
    view.box.checked = selected;
    view.box.setAttribute("aria-label", `select ${label}`);
  }
  setText(view.hide, hidden ? "show" : "hide");
  view.hide.disabled = !selected;
  view.hide.setAttribute("aria-label", `${hidden ? "show" : "hide"} the curve of ${label}`);
  if (view.memory) showMemory(view.memory, row, label, model.get("opened") === row.name);
  const cell = view.about.firstChild;
  setText(cell, row.error || row.remark);
  cell.className = row.error ? "bad" : "";
}

/** The button that opens the memory of a row's run below the table, or closes it. */
function showMemory(node, row, label, open) {
  setText(node, open ? "close" : "show");
  node.disabled = !row.saved;
  node.setAttribute("aria-label", `${open ? "close" : "show"} the memory of ${label}`);
  node.setAttribute("aria-expanded", open);
  node.title = row.saved ? "Where the answers of this run's last checkpoint come from" : "This run has no checkpoint.";
}

// -- the table --------------------------------------------------------------------------------------------------------

function makeHead(model, head, columns, selectAll) {
  const line = html("tr", "");
  let all = null;
  if (model.get("selectable")) {
    all = html("input", { type: "checkbox", "aria-label": "select all runs shown" }, html("th", { scope: "col" }, line));
    all.addEventListener("change", () => selectAll(all.checked));
  }
  html("th", { scope: "col" }, line, "curve");
  if (model.get("opens_memory")) html("th", { scope: "col" }, line, "memory");
  const heads = columns.map((column) => {
    const cell = html("th", { scope: "col", class: ["method", "seed number"].includes(column.kind) ? column.kind : column.number ? "number" : "" }, line);
    const press = () => put(model, "sort", nextOrder(model.get("sort"), column.key));
    return [column, cell, button(cell, column.heading, press, { title: column.title ?? "" })];
  });
  head.replaceChildren(line);
  return { all, heads };
}

function showOrder(heads, [key, descending]) {
  for (const [column, cell, press] of heads) {
    const mine = column.key === key;
    cell.setAttribute("aria-sort", mine ? (descending ? "descending" : "ascending") : "none");
    setText(press, column.heading + (mine ? (descending ? " ▼" : " ▲") : ""));
  }
}

function makeGroup(columns, experiment) {
  const line = html("tr", "group");
  const cell = html("th", { colspan: columns.length + 3, scope: "colgroup" }, line, `${experiment} `);
  return { line, count: html("span", "count", cell) };
}

/** Puts the lines into the body in this order; the focus stays where it is. */
function place(body, lines) {
  if (lines.length === body.children.length && lines.every((line, i) => body.children[i] === line)) return;
  const focused = body.getRootNode().activeElement;
  body.replaceChildren(...lines);
  if (body.contains(focused)) focused.focus({ preventScroll: true });
}

// -- the widget -------------------------------------------------------------------------------------------------------

function render({ model, el }) {
  const { root, error } = rootOf(el, "run-table", "Runs");
  const bar = html("div", "bar", root);
  const search = html("input", { type: "search", placeholder: "filter by text", "aria-label": "filter runs by text" }, bar);
  const boxes = [labelled(bar, "group by experiment", model, "grouped"), labelled(bar, "settings of the methods", model, "every_setting")];
  const count = html("span", { class: "count", role: "status" }, bar);
  const scrolls = html("div", { class: "scrolls", role: "region", tabindex: "0", "aria-label": "Table of runs" }, root);
  const table = html("table", "", scrolls);
  const [head, body] = [html("thead", "", table), html("tbody", "", table)];
  const none = html("div", "none", scrolls);
  const wide = html("div", "wide", root, "→ More columns to the right: scroll the table sideways.");
  let [views, groups] = [new Map(), new Map()];
  let built = "";
  let parts = { all: null, heads: [] };
  let shown = [];

  const selectAll = (present) => change(model, "selected", shown.map(({ name }) => name), present);

  function groupOf(columns, experiment, size) {
    if (!groups.has(experiment)) groups.set(experiment, makeGroup(columns, experiment));
    const { line, count: sizeOf } = groups.get(experiment);
    setText(sizeOf, `(${quantity(size, "run")})`);
    return line;
  }

  function draw() {
    const [rows, settings] = [model.get("rows"), model.get("settings")];
    const [kept, every] = [filtered(rows, model.get("filter")), model.get("every_setting")];
    const columns = columnsOf(kept, model.get("metrics"), settings, every, model.get("helps"));
    const signature = JSON.stringify(columns.map(({ key, heading }) => [key, heading]));
    if (signature !== built) {
      [views, groups, built] = [new Map(), new Map(), signature];
      parts = makeHead(model, head, columns, selectAll);
      sizes.disconnect();
      sizes.observe(head.querySelector("th.method"));
    }
    const [key, descending] = model.get("sort");
    shown = sorted(kept, columns.find((column) => column.key === key), descending);
    const lines = [];
    for (const [experiment, members] of grouping(shown, model.get("grouped"), kept)) {
      if (experiment) lines.push(groupOf(columns, experiment, members.length));
      for (const row of members) {
        if (!views.has(row.name)) views.set(row.name, makeRow(model, columns, row.name));
        const view = views.get(row.name);
        fillRow(model, columns, view, row);
        lines.push(view.line, ...(row.error || row.remark ? [view.about] : []));
      }
    }
    place(body, lines);
    showOrder(parts.heads, model.get("sort"));
    showAbout(rows, settings);
    showWide();
  }

  /** Says that columns are cut off, until the last one is in view. */
  const showWide = () => (wide.hidden = scrolls.scrollLeft + scrolls.clientWidth >= scrolls.scrollWidth - 2);

  function showAbout(rows, settings) {
    const selected = model.get("selected");
    const chosen = shown.filter(({ name }) => selected.includes(name)).length;
    if (parts.all) Object.assign(parts.all, { checked: chosen > 0 && chosen === shown.length, indeterminate: chosen > 0 && chosen < shown.length });
    const some = shown.length < rows.length ? `${shown.length} of ${quantity(rows.length, "run")} shown` : quantity(rows.length, "run");
    setText(count, model.get("selectable") ? `${some}, ${selected.length} selected` : some);
    table.hidden = !shown.length;
    setText(none, shown.length ? "" : rows.length ? "No run contains these words." : "There are no runs yet.");
    boxes[1].label.hidden = !settings.some(({ by_method }) => by_method);
    for (const { show } of boxes) show();
    if (search.value !== model.get("filter") && root.getRootNode().activeElement !== search) search.value = model.get("filter");
  }

  function onKey(event) {
    const control = event.target.closest("[data-key]");
    const moves = { ArrowUp: -1, ArrowDown: 1, Home: -Infinity, End: Infinity };
    if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "a" && scrolls.contains(event.target) && parts.all) {
      selectAll(true);
      takeKey(event);
    } else if (control && event.key in moves) {
      const same = [...body.querySelectorAll(`[data-key=${control.dataset.key}]`)].filter((node) => !node.disabled);
      const to = Math.min(Math.max(same.indexOf(control) + moves[event.key], 0), same.length - 1);
      same[to].focus();
      takeKey(event);
    } else keepKeys(event);
  }

  // The column of seeds stays beside that of the methods, which is as wide as its longest name.
  const sizes = new ResizeObserver(([{ target }]) => table.style.setProperty("--method-width", `${target.offsetWidth}px`));
  const room = new ResizeObserver(showWide);
  room.observe(scrolls);
  scrolls.addEventListener("scroll", showWide);
  const schedule = inFrames(draw);
  search.addEventListener("input", () => put(model, "filter", search.value));
  root.addEventListener("keydown", onKey);
  const traits = ["rows", "settings", "metrics", "helps", "selected", "hidden", "sort", "filter", "grouped", "every_setting", "opened"];
  const end = () => (schedule.cancel(), sizes.disconnect(), room.disconnect());
  return follow(model, { ...Object.fromEntries(traits.map((trait) => [trait, schedule])), error }, end);
}

export default { render };
