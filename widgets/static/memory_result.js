// A prediction with and without the erased writes, side by side, and the list of the strongest writes.

import { follow, html, put, rootOf, unpacked } from "./shared.js";

const percent = (value) => `${(value * 100).toFixed(value < 0.1 ? 2 : 1)} %`;

function drawColumn(parent, { title, facts, alternatives, answer }) {
  const column = html("section", "column", parent);
  html("h4", "", column, title);
  const table = html("table", "", column);
  for (const [name, value] of facts) {
    const line = html("tr", "", table);
    html("th", { scope: "row" }, line, name);
    html("td", "", line, value);
  }
  const written = html("tr", "", table);
  html("th", { scope: "row" }, written, "greedy answer");
  html("code", "", html("td", "answer", written), answer);
  html("div", "quiet", column, "most likely tokens");
  const list = html("table", "likely", column);
  for (const [text, chance, target] of alternatives) {
    const line = html("tr", target ? "target" : "", list);
    html("td", "", line).append(html("code", "", null, text), target ? " ✓" : "");
    html("span", { style: `width: ${Math.max(chance * 60, 1).toFixed(1)}px` }, html("td", "share", line));
    html("td", "number", line, percent(chance));
  }
}

function drawWrites(parent, model, { strongest, listed }) {
  const column = html("section", "column writes", parent);
  html("h4", "", column, listed);
  const list = html("ol", "", column);
  for (const { token, text, effect, sign } of strongest) {
    const item = html("li", "", list);
    const title = `Go to token ${token}`;
    const button = html("button", { type: "button", title }, item);
    html("code", "", button, text || "part of a character");
    html("span", "quiet", item, ` token ${token.toLocaleString("en")}: ${effect}, ${sign} it`);
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
    html("h3", "", content, result.question);
    html("p", { class: "change", role: "status" }, content, result.change);
    const columns = html("div", "columns", content);
    for (const column of result.columns) drawColumn(columns, column);
    if (result.strongest.length) drawWrites(columns, model, result);
  };
  return follow(model, { result: draw, error });
}

export default { render };
