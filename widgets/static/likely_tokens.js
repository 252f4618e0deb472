// The most likely tokens of two models in place of the selected token, side by side. A mark beside a token tells where the
// other model ranks it.

import { counts, floats, follow, html, inFrames, rootOf, typed, unpacked } from "./shared.js";

const LONGEST = 40; // characters of a token

const number = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");
const signed = (value, digits) => (value > 0 ? "+" : "") + number(value, digits);
const shorter = (text) => (text.length > LONGEST ? `${text.slice(0, LONGEST).replace(/[\ud800-\udbff]$/, "")}…` : text);
const percent = (value) => `${(value * 100).toFixed(value < 0.1 ? 2 : 1)} %`;

/** The mark of a token of rank `rank` that the other model has at `elsewhere`, 0 if not at all: [sign, sentence]. */
export function markOf(rank, elsewhere, name, other) {
  if (!elsewhere) return [`only ${name}`, `not among the most likely tokens of ${other}`];
  if (elsewhere === rank) return ["=", `rank ${rank} in ${other} too`];
  return [`${elsewhere} in ${other}`, `rank ${elsewhere} in ${other}`];
}

function unpackedSide(side) {
  return {
    ids: counts(side.ids),
    probabilities: floats(side.probabilities),
    elsewhere: typed(side.elsewhere, Uint8Array),
    logprobs: floats(side.logprobs),
    ranks: counts(side.ranks),
  };
}

function drawSide(line, doc, side, at, rank, [name, other], reference) {
  const [id, probability, elsewhere] = [side.ids[at], side.probabilities[at], side.elsewhere[at]];
  const [sign, sentence] = markOf(rank, elsewhere, name, other);
  const changed = elsewhere !== rank;
  const cell = html("td", changed ? "token changed" : "token", line);
  html("code", "", cell, shorter(doc.strings[id]));
  if (id === reference) html("span", { class: "reference", title: "the reference" }, cell, " ✓");
  const share = html("td", "share", line);
  html("span", { class: "bar", style: `width: ${Math.max(probability * 56, 1).toFixed(1)}px` }, share);
  html("span", "", share, percent(probability));
  html("td", { class: changed ? "mark changed" : "mark", title: sentence, "aria-label": sentence }, line, sign);
}

/** The rows of the reference token: its log p and rank under both, and B minus A. */
function drawReference(body, doc, token) {
  const { a, b } = doc;
  const facts = [
    ["log p (nats)", number(a.logprobs[token], 3), number(b.logprobs[token], 3), signed(b.logprobs[token] - a.logprobs[token], 3)],
    ["rank", `${a.ranks[token]}`, `${b.ranks[token]}`, signed(b.ranks[token] - a.ranks[token], 0)],
  ];
  for (const row of facts) {
    const line = html("tr", "", body);
    html("th", { scope: "row" }, line, row[0]);
    for (const text of row.slice(1)) html("td", "number", line, text);
  }
}

function draw(parent, doc, token, names) {
  parent.replaceChildren();
  const none = "Select a token of the document to see what both models expected in its place.";
  const first = "No model predicts the first token.";
  if (!doc.tokens || token < 1) return html("p", "note", parent, token === 0 ? first : none);
  const reference = doc.tokens[token];
  const title = html("h3", "", parent, `Token ${token.toLocaleString("en")}, reference `);
  html("code", "", title, shorter(doc.strings[reference]));
  const scrolls = (label) => html("div", { class: "scrolls", role: "region", tabindex: "0", "aria-label": label }, parent);
  const facts = html("table", "facts", scrolls("The reference under both models"));
  const top = html("tr", "", html("thead", "", facts));
  for (const text of ["", "A", "B", "B − A"]) html(text ? "th" : "td", text ? { scope: "col" } : "", top, text);
  drawReference(html("tbody", "", facts), doc, token);

  const table = html("table", "likely", scrolls("Likely tokens of both models in place of the reference"));
  const head = html("tr", "", html("thead", "", table));
  html("th", { scope: "col" }, head, "rank");
  ["A", "B"].forEach((side, i) => html("th", { scope: "colgroup", colspan: 3, title: names[i] }, head, `${side}: likely tokens`));
  const body = html("tbody", "", table);
  for (let i = 0; i < doc.width; i++) {
    const line = html("tr", "", body);
    html("th", { scope: "row" }, line, `${i + 1}`);
    drawSide(line, doc, doc.a, token * doc.width + i, i + 1, ["A", "B"], reference);
    drawSide(line, doc, doc.b, token * doc.width + i, i + 1, ["B", "A"], reference);
  }
  html("p", "note", parent, "Bold: tokens whose rank differs, with the rank in the other model, or “only” if it is not in the other list. ✓: the reference.");
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "likely-tokens", "The selected token under both models");
  const content = html("div", { role: "status" }, root);
  let doc = {};
  const schedule = inFrames(() => draw(content, doc, model.get("selected"), model.get("names")));
  const load = () => {
    const packed = unpacked(model.get("document"));
    doc = packed.tokens
      ? { ...packed, tokens: counts(packed.tokens), a: unpackedSide(packed.a), b: unpackedSide(packed.b) }
      : {};
    schedule();
  };
  return follow(model, { document: load, selected: schedule, names: schedule, error }, schedule.cancel);
}

export default { render };
