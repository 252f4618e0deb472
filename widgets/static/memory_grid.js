// Memory parts by heads, as a table of buttons: the arrow keys move, Enter and Space choose. The page marks a choice at once.

import { clamp, floats, follow, format, html, onTheme, put, rootOf, takeKey, unpacked } from "./shared.js";
import { isDark, rampOf } from "./token_colours.js";

const key = (row, head) => `${row} ${head}`;

/** The chosen cells after a press on some of them: of all heads only these; else they are added, or taken away if all are there. */
export function toggled(chosen, cells) {
  const known = new Map(chosen.map((cell) => [key(...cell), cell]));
  const all = cells.every((cell) => known.has(key(...cell)));
  for (const cell of cells) all ? known.delete(key(...cell)) : known.set(key(...cell), cell);
  return [...known.values()];
}

/** Level 1 to 255 of a value on a scale that ends at `most`; 0 for NaN. */
export function levelOf(value, most, diverging) {
  if (Number.isNaN(value)) return 0;
  const share = diverging ? 0.5 + (0.5 * value) / most : value / most;
  return 1 + Math.round(clamp(share, 0, 1) * 254);
}

const short = (value) => (Number.isNaN(value) ? "" : value.toFixed(clamp(2 - Math.floor(Math.log10(Math.abs(value) || 1)), 0, 2)).replace("-", "−"));

function isDarkOn(root) {
  const context = html("canvas", { width: 1, height: 1 }).getContext("2d");
  context.fillStyle = getComputedStyle(root).getPropertyValue("--ground").trim() || "#fff";
  return isDark(context.fillStyle);
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "memory-grid", "Layers and heads of the memory");
  const title = html("div", "title", root);
  const note = html("p", { class: "note", role: "status" }, root);
  const scrolls = html("div", "scrolls", root);
  const foot = html("div", "foot", root);
  const reset = html("button", { type: "button", "data-asks": true }, foot, "All heads");
  const count = html("span", { class: "count", role: "status" }, foot);
  let [data, at] = [null, [0, 0]];

  const selectable = () => model.get("selectable") && !model.alone;
  const cellAt = (row, head) => scrolls.querySelector(`[data-cell="${key(row, head)}"]`);

  function drawCell(line, row, head, ramp) {
    const value = data.values[row * data.heads + head];
    const cell = html("td", "", line);
    if (Number.isNaN(value)) return;
    const level = levelOf(value, data.most, data.diverging);
    const { layer, name } = data.rows[row];
    const label = `layer ${layer} ${name}, head ${head}: ${format(value)}`;
    const look = { style: `background: ${ramp.grounds[level]}; color: ${ramp.inks[level]}`, "aria-label": label, title: label };
    const kind = selectable() ? { type: "button", "data-asks": true } : {};
    html(selectable() ? "button" : "span", { ...look, ...kind, "data-cell": key(row, head), class: "cell", tabindex: -1 }, cell, short(value));
  }

  function build() {
    const packed = unpacked(model.get("grid"));
    scrolls.replaceChildren();
    data = packed.rows?.length ? { ...packed, values: floats(packed.values), whole: floats(packed.of_part) } : null;
    title.textContent = data?.title ?? "";
    note.textContent = data?.note ?? "";
    root.hidden = !data;
    if (!data) return;
    const ramp = rampOf(isDarkOn(root), data.diverging);
    const table = html("table", "", scrolls);
    const head = html("tr", "", html("thead", "", table));
    html("td", "", head);
    for (let i = 0; i < data.heads; i++) html("th", { scope: "col" }, head, `head ${i}`);
    if (data.whole) html("th", { scope: "col" }, head, "all");
    const body = html("tbody", "", table);
    data.rows.forEach(({ layer, name, heads }, row) => {
      const line = html("tr", "", body);
      const label = html("th", { scope: "row" }, line);
      const text = `layer ${layer} ${name}`;
      if (selectable()) html("button", { type: "button", class: "row", "data-asks": true, "data-row": row, title: "Choose the whole row" }, label, text);
      else label.textContent = text;
      for (let i = 0; i < data.heads; i++) drawCell(line, row, i, ramp);
      if (data.whole) html("td", "whole", line, short(data.whole[row]));
    });
    at = [Math.min(at[0], data.rows.length - 1), 0];
    mark();
  }

  /** Marks the chosen cells, and puts one cell into the order of the Tab key. */
  function mark() {
    if (!data) return;
    const chosen = new Set(model.get("chosen").map((cell) => key(...cell)));
    for (const cell of scrolls.querySelectorAll(".cell")) {
      const on = !chosen.size || chosen.has(cell.dataset.cell);
      cell.classList.toggle("off", !on);
      if (selectable()) cell.setAttribute("aria-pressed", on);
    }
    const first = cellAt(...at);
    if (first && selectable()) first.tabIndex = 0;
    foot.hidden = !selectable();
    reset.disabled = !chosen.size;
    count.textContent = chosen.size ? `${chosen.size} of ${data.rows.reduce((sum, { heads }) => sum + heads, 0)} heads chosen` : "";
  }

  function choose(cells) {
    put(model, "chosen", toggled(model.get("chosen"), cells));
    mark();
  }

  const moveTo = (row, head) => data.rows[row] && head >= 0 && cellAt(row, head)?.focus();

  scrolls.addEventListener("click", ({ target }) => {
    if (!selectable()) return;
    const cell = target.closest(".cell");
    const row = target.closest(".row");
    if (cell) choose([cell.dataset.cell.split(" ").map(Number)]);
    else if (row) choose(Array.from({ length: data.rows[row.dataset.row].heads }, (_, head) => [Number(row.dataset.row), head]));
  });
  scrolls.addEventListener("focusin", ({ target }) => {
    if (!target.matches(".cell")) return;
    cellAt(...at)?.setAttribute("tabindex", -1);
    at = target.dataset.cell.split(" ").map(Number);
    target.tabIndex = 0;
  });
  scrolls.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step || !event.target.closest(".cell")) return;
    takeKey(event);
    moveTo(at[0] + step[0], Math.min(at[1] + step[1], (data.rows[at[0] + step[0]]?.heads ?? 1) - 1));
  });
  reset.addEventListener("click", () => {
    put(model, "chosen", []);
    mark();
  });
  return follow(model, { grid: build, chosen: mark, error }, onTheme(root, build));
}

export default { render };
