// Tables of text; a table that is wider than the page scrolls, also by the keyboard.

import { explained, follow, html } from "./shared.js";

function draw(root, tables) {
  root.replaceChildren();
  for (const { caption, columns, rows, sentence, details, note, methods = [], helps = [] } of tables) {
    if (sentence) html("p", "sentence", root, sentence);
    if (details) html("p", "details", root, details);
    const scrolls = html("div", { class: "scrolls", role: "region", tabindex: "0", "aria-label": caption }, root);
    const table = html("table", "", scrolls);
    html("caption", "", table, caption);
    const head = html("tr", "", html("thead", "", table));
    columns.forEach((column, i) => html("th", { scope: "col", ...explained(helps[i]) }, head, column));
    const body = html("tbody", "", table);
    for (const row of rows) {
      const line = html("tr", "", body);
      for (const cell of row) html("td", "", line, cell);
    }
    if (note) html("p", "note", root, note);
    const list = methods.length ? html("dl", "methods", root) : null;
    for (const [label, text] of methods) {
      html("dt", "", list, label);
      html("dd", "", list, text);
    }
  }
}

function render({ model, el }) {
  const root = html("div", "refine-lab text-tables", el);
  return follow(model, { tables: () => draw(root, model.get("tables")) });
}

export default { render };
