// A prediction with and without the erased writes, side by side, and the list of the strongest writes.

import { follow, html, put, rootOf, unpacked } from "./shared.js";

const percent = (value) => `${(value * 100).toFixed(value < 0.1 ? 2 : 1)} %`;

/** One table with a column for each prediction, and in its last rows the most likely tokens of each. */
function drawPredictions(parent, columns) {
  const table = html("table", "predictions", html("div", "scrolls", parent));
  const head = html("tr", "", html("thead", "", table));
  html("td", "", head);
  for (const { title } of columns) html("th", { scope: "col" }, head, title);
  const body = html("tbody", "", table);
  const row = (name, fill) => {
    const line = html("tr", "", body);
    html("th", { scope: "row" }, line, name);
    for (const column of columns) fill(html("td", "", line), column);
  };
  columns[0].facts.forEach(([name], i) => row(name, (cell, { facts }) => (cell.textContent = facts[i][1])));
  row("greedy answer", (cell, { answer }) => html("code", "", cell, answer));
  for (let i = 0; i < Math.max(...columns.map(({ alternatives }) => alternatives.length)); i++) {
    row(i ? `${i + 1}.` : "most likely token", (cell, { alternatives }) => {
      const [text, chance, target] = alternatives[i] ?? ["", 0, false];
      if (target) cell.classList.add("target");
      html("code", "", cell, text);
      html("span", "chance", cell, ` ${percent(chance)}${target ? " ✓" : ""}`);
    });
  }
}

const FEW = 6; // writes that are listed before the others are asked for

function drawWrites(parent, model, { strongest, listed, why }) {
  const column = html("section", "writes", parent);
  html("h4", { class: "explained", title: why.join(" ") }, column, listed);
  drawList(html("ol", "", column), model, strongest.slice(0, FEW));
  if (strongest.length > FEW) {
    const more = html("details", "", column);
    html("summary", "", more, `${strongest.length - FEW} more`);
    drawList(html("ol", "", more), model, strongest.slice(FEW));
  }
  for (const sentence of why) html("p", "quiet", column, sentence);
}

function drawList(list, model, writes) {
  for (const { token, text, effect, size, sign } of writes) {
    const item = html("li", "", list);
    html("span", { class: `sign ${sign}`, "aria-hidden": true }, item, sign === "raises" ? "▲" : "▼");
    const title = `Go to token ${token}`;
    const button = html("button", { type: "button", title }, item);
    html("code", "", button, text || "part of a character");
    html("span", "quiet", item, ` token ${token.toLocaleString("en")}: ${effect} (size ${size}), ${sign} it`);
    button.addEventListener("click", () => put(model, "place", [token, token]));
  }
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "memory-result", "Prediction and the writes that it depends on");
  const content = html("div", "", root);
  const draw = () => {
    const result = unpacked(model.get("result"));
    content.replaceChildren();
    if (!result.question) return;
    if (result.model) html("p", "model", content, `Model: ${result.model}`);
    if (result.context) html("p", "context", content, result.context);
    html("h3", "", content, result.question);
    if (result.own) html("p", { class: "own", role: "status" }, content, result.own);
    html("p", { class: "change", role: "status" }, content, result.change);
    drawPredictions(content, result.columns);
    if (result.strongest.length) drawWrites(content, model, result);
  };
  return follow(model, { result: draw, error });
}

export default { render };
