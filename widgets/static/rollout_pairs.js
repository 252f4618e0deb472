// Rollouts of two models or steps in pairs, token by token below the reference. The first token in which the two differ is
// framed, later ones are shaded, and tokens that equal the reference are underlined.

import { follow, html, inFrames, rootOf, unpacked } from "./shared.js";

const NOTE =
  "Framed: the first token in which the two differ; shaded: later ones. Underlined: tokens that equal the reference; match is their fraction.";
const NUMBERS = ["log p", "match", "reward"];
const DIGITS = [2, 2, 3];

const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");

function drawTokens(line, row, side, width) {
  row[side].forEach((text, i) => {
    const [changed, match] = [row.changed[i], row[`match_${side}`][i]];
    const said = [i === row.same ? "first difference" : changed && "differs", match && "equals the reference"].filter(Boolean).join(", ");
    const cell = html("td", "", line);
    const look = [changed && "changed", i === row.same && "first", match && "match"].filter(Boolean).join(" ");
    html("code", { class: look, title: said }, cell, text);
    if (said) html("span", "unseen", cell, ` (${said})`);
  });
  for (let i = row[side].length; i < width; i++) html("td", "", line);
}

function drawGroup(parent, group, names) {
  const title = html("p", "place", parent, `${group.place}: `);
  html("code", "", title, `…${group.prefix}`);
  const label = `Rollouts at ${group.place}`;
  const table = html("table", "", html("div", { class: "scrolls", role: "region", tabindex: "0", "aria-label": label }, parent));
  const width = Math.max(group.reference.length, ...group.rows.map((row) => Math.max(row.a.length, row.b.length)));
  const head = html("tr", "", html("thead", "", table));
  html("th", { scope: "col", colspan: 2 }, head, "reference");
  for (let i = 0; i < width; i++) html("code", "", html("th", "reference", head), group.reference[i] ?? "");
  for (const name of NUMBERS) html("th", { scope: "col", class: "number" }, head, name);
  for (const row of group.rows) {
    const body = html("tbody", "", table);
    ["a", "b"].forEach((side, i) => {
      const line = html("tr", "", body);
      if (!i) html("th", { scope: "rowgroup", rowspan: 2, class: "index" }, line, `#${row.index}`);
      html("th", { scope: "row" }, line, names[i]);
      drawTokens(line, row, side, width);
      row[`numbers_${side}`].forEach((value, at) => html("td", "number", line, number(value, DIGITS[at])));
    });
  }
}

function draw(parent, { title, summary, names, groups }, hint) {
  parent.replaceChildren();
  if (!groups) return html("p", "note", parent, `No rollouts yet: ${hint}.`);
  html("h3", "", parent, title);
  html("p", "", parent, summary);
  html("p", "note", parent, NOTE);
  for (const group of groups) drawGroup(parent, group, names);
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "rollout-pairs", "Rollouts of both in pairs");
  const content = html("div", "", root);
  const schedule = inFrames(() => draw(content, unpacked(model.get("content")), model.get("hint")));
  return follow(model, { content: schedule, error }, schedule.cancel);
}

export default { render };
