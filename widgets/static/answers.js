// A table of answers. Each is in a read-only field that takes the focus, so that the keyboard scrolls and copies it.

import { follow, html, keepKeys } from "./shared.js";

const COLUMNS = ["", "answer", "right or wrong", "log p of the reference (nats)"];

function draw(root, rows) {
  root.replaceChildren();
  if (!rows.length) return;
  const table = html("table", "", root);
  const scored = rows.some(({ verdict }) => verdict);
  const head = html("tr", "", html("thead", "", table));
  for (const column of scored ? COLUMNS : COLUMNS.slice(0, 2)) html("th", { scope: "col" }, head, column);
  const body = html("tbody", "", table);
  for (const { label, answer, verdict = "", logprob = "" } of rows) {
    const line = html("tr", "", body);
    html("th", { scope: "row" }, line, label);
    const name = label === "reference" ? "reference answer" : `answer ${label}`;
    const field = html("textarea", { readonly: true, rows: answer.length > 60 ? 2 : 1, "aria-label": name }, html("td", "", line));
    field.value = answer;
    field.addEventListener("keydown", (event) => keepKeys(event, "ac")); // select all, copy
    if (!scored) continue;
    html("td", verdict === "wrong" ? "bad" : "", line, verdict);
    html("td", "number", line, logprob);
  }
}

function render({ model, el }) {
  const root = html("div", "refine-lab answers", el);
  return follow(model, { rows: () => draw(root, model.get("rows")) });
}

export default { render };
