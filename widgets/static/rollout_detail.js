// The parts beside the list of rollouts: one rollout token by token, several side by side, table F.1, the rewards' histogram.

import { histogram, isMatch, lengthOf, markdownF1, tableF1, visibleParts } from "./rollout_data.js";
import { beginning, decimals, describe, placeOf, rolloutCells, targetCells, tokenCell } from "./rollout_list.js";
import { button, copyText, html, svg } from "./shared.js";

const BINS = 32;
const LONGEST_TEXT = 2000; // characters of a token of the prefix, or of a text of table F.1, that are drawn

/** The numbers of a rollout, those shared by its position last: { name, heading, digits, shared }. */
function numbersOf(fields) {
  const numbers = fields.filter(({ digits }) => digits !== null).sort((a, b) => a.shared - b.shared);
  const heading = ({ heading, label, unit }) => (heading || label) + (unit ? ` (${unit})` : "");
  return numbers.map((field) => ({ ...field, heading: heading(field) }));
}

function tableOf(parent, className, heads) {
  const table = html("table", className, parent);
  const line = html("tr", "", html("thead", "", table));
  const cells = heads.map((head) => html("th", { scope: "col" }, line, head));
  return { cells, body: html("tbody", "", table) };
}

/** Tokens as running text, with signs for invisible characters and with line breaks. */
function writeTokens(parent, data, ids) {
  for (const id of ids.filter(Boolean)) {
    const token = html("span", "piece", parent);
    for (const [text, sign] of visibleParts(beginning(data.strings[id], LONGEST_TEXT))) {
      html("span", sign ? "sign" : "", token, text === "⏎" ? "⏎\n" : text);
    }
  }
}

// -- one rollout ------------------------------------------------------------------------------------------------------

/** The selected rollout: its prefix, and target and rollout token by token. */
export function drawDetail(parent, { data, fields, selected, compared }, pin) {
  parent.replaceChildren();
  const note = data.rows ? "Select a rollout to see it token by token." : "No rollouts yet.";
  if (selected < 0) return html("p", "note", parent, note);
  const group = data.group[selected];
  const title = describe(data, selected);
  const top = html("div", "title", parent);
  html("h3", "", top, title[0].toUpperCase() + title.slice(1));
  const text = compared.includes(selected) ? "Unpin" : "Pin";
  button(top, text, () => pin(selected), { title: "Pin for comparison (Enter in the list)" });
  const facts = html("dl", "facts", parent);
  for (const { name, heading, digits } of numbersOf(fields)) {
    const pair = html("div", "", facts);
    html("dt", "", pair, heading);
    html("dd", "", pair, decimals(data.numbers[name][selected], digits));
  }
  html("h4", "", parent, "Prefix");
  const prefix = html("div", "prefix", parent);
  html("span", "sign", prefix, "…");
  writeTokens(prefix, data, data.prefixes.subarray(group * data.prefix, (group + 1) * data.prefix));
  html("h4", "", parent, "Token by token");
  drawAligned(parent, data, selected);
}

function drawAligned(parent, data, row) {
  const group = data.group[row];
  const heads = ["", "reference", "", "rollout", "log p (nats)", "cosine"].slice(0, data.cosines ? 6 : 5);
  const { body } = tableOf(parent, "aligned", heads);
  const [long, short] = [lengthOf(data, data.tokens, row), lengthOf(data, data.targets, group)];
  for (let i = 0; i < Math.max(long, short); i++) {
    const line = html("tr", "", body);
    const at = row * data.width + i;
    const match = isMatch(data, row, i);
    html("td", "index", line, i + 1);
    const target = html("td", "", line);
    if (i < short) tokenCell(target, data, data.targets[group * data.width + i], { isTarget: true });
    html("td", { class: match ? "same" : "unlike", "aria-label": match ? "equal" : "differs" }, line, match ? "=" : "≠");
    const rolled = html("td", "", line);
    if (i < long) tokenCell(rolled, data, data.tokens[at], { match });
    const probability = Math.exp(data.logprobs[at]);
    const logprob = shareCell(line, probability, decimals(data.logprobs[at]));
    if (i < long) logprob.title = `probability ${(probability * 100).toFixed(1)} %`;
    if (data.cosines) shareCell(line, data.cosines[at], decimals(data.cosines[at], 2));
  }
}

function shareCell(line, share, text) {
  const cell = html("td", "share", line);
  if (!Number.isFinite(share)) return cell;
  const style = `width: ${Math.min(Math.abs(share), 1) * 100}%`;
  html("span", { class: share < 0 ? "below" : "above", style }, html("span", "track", cell));
  html("span", "", cell, text);
  return cell;
}

// -- several side by side ---------------------------------------------------------------------------------------------

/** The pinned rollouts, one per column; the highest value of a line is bold. */
export function drawCompared(parent, { data, fields, compared, selected }, { choose, pin }) {
  parent.replaceChildren();
  parent.hidden = !compared.length;
  if (!compared.length) return;
  html("h3", "", parent, "Pinned rollouts side by side");
  const { body, cells } = tableOf(html("div", "wide", parent), "compared", ["", ...compared.map(() => "")]);
  compared.forEach((row, i) => {
    const head = cells[i + 1];
    head.classList.toggle("selected", row === selected);
    const name = `${placeOf(data, data.group[row])} · #${data.sample_index[row]}`;
    button(head, name, () => choose(row), { title: "Show in the list", class: "plain" });
    button(head, "×", () => pin(row), { "aria-label": `Unpin ${describe(data, row)}`, class: "plain" });
  });
  const addLine = (label, draw) => {
    const line = html("tr", "", body);
    html("th", { scope: "row" }, line, label);
    for (const row of compared) draw(html("td", "", line), row);
  };
  const flow = (cell) => html("span", "flow", cell);
  addLine("reference", (cell, row) => targetCells(flow(cell), data, data.group[row]));
  addLine("rollout", (cell, row) => rolloutCells(flow(cell), data, row));
  for (const { name, heading, digits, shared } of numbersOf(fields)) {
    const values = compared.map((row) => data.numbers[name][row]);
    const top = Math.max(...values.filter(Number.isFinite));
    const mark = !shared && values.some((value) => value < top);
    addLine(heading, (cell, row) => {
      const value = data.numbers[name][row];
      cell.className = mark && value === top ? "number best" : "number";
      cell.textContent = decimals(value, digits);
    });
  }
}

// -- table F.1 --------------------------------------------------------------------------------------------------------

/** Table F.1 of the first listed positions; `announce` reports whether copying succeeded. */
export function drawTableF1(parent, { data, rows }, { close, announce }) {
  parent.replaceChildren();
  const top = html("div", "title", parent);
  html("h3", "", top, "Table F.1: cosine reward of rollouts and the reference");
  const table = tableF1(data, rows);
  const copy = async () =>
    announce((await copyText(markdownF1(table), parent)) ? "Table F.1 copied." : "The browser does not allow copying.");
  button(top, "Copy as Markdown", copy).disabled = !table.length;
  button(top, "Close", close);
  if (!table.length) return html("p", "note", parent, "No rollout is listed.");
  const { body } = tableOf(parent, "f1", ["Example", "Type", "Text", "Cosine reward"]);
  for (const { example, type, text, value, best } of table) {
    const line = html("tr", type === "GT" ? "target" : "", body);
    html("th", "", line, example);
    html("td", "", line, type);
    html("td", "words", line, beginning(text, LONGEST_TEXT));
    html("td", best ? "number best" : "number", line, best ? `★ ${value}` : value);
  }
  html("p", "note", parent, "The first positions of the list with their first rollouts; ★ marks the rollout with the highest cosine reward in each example.");
}

// -- histogram --------------------------------------------------------------------------------------------------------

/** The rewards of all rollouts, pale; in front of them those of the listed ones, and apart those of clicked positions. */
export function drawHistogram(figure, { data, ranked, rows, range }) {
  const picture = svg("svg", { viewBox: "0 0 200 43", preserveAspectRatio: "none", role: "img" });
  const [low, high] = range ?? [0, 1];
  const clicked = (row) => data.clicked.has(data.group[row]);
  const sampled = Int32Array.from({ length: data.rows }, (_, row) => row).filter((row) => !clicked(row));
  const [all, shown, apart] = [sampled, rows.filter((row) => !clicked(row)), rows.filter(clicked)].map((some) =>
    histogram(ranked, some, low, high, BINS),
  );
  const most = Math.max(1, ...all.counts, ...apart.counts);
  const step = 200 / BINS;
  for (const [name, { counts }] of Object.entries({ all, shown, clicked: apart })) {
    counts.forEach((number, i) => {
      if (!number) return;
      const tall = Math.max((number / most) * 40, 1);
      const [from, to] = [i, i + 1].map((edge) => decimals(low + ((high - low) * edge) / BINS, 2));
      const bar = svg("rect", { class: name, x: i * step + 0.5, y: 42 - tall, width: step - 1, height: tall }, picture);
      svg("title", {}, bar, `${number.toLocaleString("en")} (${name}) with reward ${from} to ${to}`);
    });
  }
  const { mean, count } = all;
  svg("line", { class: "base", x1: 0, x2: 200, y1: 42.5, y2: 42.5 }, picture);
  const x = ((mean - low) / (high - low)) * 200;
  if (count) svg("line", { class: "mean", x1: x, x2: x, y1: 0, y2: 42 }, picture);
  const [first, last] = [low, high].map((edge) => decimals(edge, 2));
  const part = shown.count === count ? "" : shown.count ? `; ${shown.count} shown: ${decimals(shown.mean)}` : "; none shown";
  const middle = count ? `mean reward ${decimals(mean)}${part}` : "reward";
  const others = apart.count ? `; ${apart.count} at clicked positions` : "";
  const label = `Rewards of ${count} rollouts from ${first} to ${last}, mean ${decimals(mean)}${part}${others}`;
  picture.setAttribute("aria-label", count ? label : "No rewards");
  figure.replaceChildren(picture);
  const caption = html("figcaption", "", figure);
  for (const text of [range && first, middle, range && last]) html("span", "", caption, text ?? "");
}
