// What stands beside the list of rollouts: one rollout token by token, several side by side, table F.1, the rewards' histogram.

import { histogram, isMatch, lengthOf, markdownF1, tableF1, visibleParts } from "./rollout_data.js";
import { beginning, decimals, describe, placeOf, tokenCell } from "./rollout_list.js";
import { button, copyText, html, svg } from "./shared.js";

const BINS = 32;
const LONGEST_TEXT = 2000; // characters of a token of the prefix, or of a text of table F.1, that are drawn

/** The numbers of a rollout, its own first: { name, heading, digits, shared }. */
function numbersOf(fields) {
  const numbers = fields.filter(({ digits }) => digits !== null);
  const ordered = [...numbers.filter(({ shared }) => !shared), ...numbers.filter(({ shared }) => shared)];
  const heading = ({ heading, label, unit }) => (heading || label) + (unit ? ` (${unit})` : "");
  return ordered.map((field) => ({ ...field, heading: heading(field) }));
}

function tableOf(parent, className, heads) {
  const table = html("table", className, parent);
  const row = html("tr", "", html("thead", "", table));
  for (const head of heads) html("th", "", row, head).scope = "col";
  return html("tbody", "", table);
}

/** A text of tokens as it would be read, with signs for what cannot be seen and line breaks kept. */
function writeTokens(parent, data, ids) {
  for (const id of ids) {
    if (!id) continue;
    const token = html("span", "piece", parent);
    for (const [text, sign] of visibleParts(beginning(data.strings[id], LONGEST_TEXT))) {
      const spaces = sign && text[0] === "·";
      html("span", sign ? "sign" : "", token, spaces ? text : text === "⏎" ? "⏎\n" : text);
    }
  }
}

// -- one rollout ------------------------------------------------------------------------------------------------------

/** The selected rollout: its prefix, and target and rollout token by token. */
export function drawDetail(parent, { data, fields, selected, compared }, pin) {
  parent.replaceChildren();
  if (selected < 0) {
    const words = data.rows ? "Select a rollout to see it token by token." : "No rollouts yet.";
    html("p", "note", parent, words);
    return;
  }
  const group = data.group[selected];
  const title = describe(data, selected);
  const top = html("div", "title", parent);
  html("h3", "", top, title[0].toUpperCase() + title.slice(1));
  button(top, compared.includes(selected) ? "Unpin" : "Pin", () => pin(selected), { title: "Pin for comparison (Enter in the list)" });
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
  const heads = ["", "reference", "", "rollout", "log p (nats)", ...(data.cosines ? ["cosine"] : [])];
  const body = tableOf(parent, "aligned", heads);
  const [long, short] = [lengthOf(data, data.tokens, row), lengthOf(data, data.targets, group)];
  for (let i = 0; i < Math.max(long, short); i++) {
    const line = html("tr", "", body);
    const at = row * data.width + i;
    const match = isMatch(data, row, i);
    html("td", "index", line, i + 1);
    const target = html("td", "", line);
    if (i < short) tokenCell(target, data, data.targets[group * data.width + i], { isTarget: true });
    html("td", match ? "same" : "unlike", line, match ? "=" : "≠").setAttribute("aria-label", match ? "equal" : "differs");
    const rolled = html("td", "", line);
    if (i < long) tokenCell(rolled, data, data.tokens[at], { match });
    const logprob = html("td", "share", line);
    shareBar(logprob, Math.exp(data.logprobs[at]), decimals(data.logprobs[at]));
    if (i < long) logprob.title = `probability ${(Math.exp(data.logprobs[at]) * 100).toFixed(1)} %`;
    if (data.cosines) shareBar(html("td", "share", line), data.cosines[at], decimals(data.cosines[at], 2));
  }
}

function shareBar(cell, share, text) {
  if (!Number.isFinite(share)) return;
  const track = html("span", "track", cell);
  const bar = html("span", share < 0 ? "below" : "above", track);
  bar.style.width = `${Math.min(Math.abs(share), 1) * 100}%`;
  html("span", "", cell, text);
}

// -- several side by side ---------------------------------------------------------------------------------------------

/** The pinned rollouts, a column each; the highest of a line in bold. */
export function drawCompared(parent, { data, fields, compared, selected }, { choose, pin }) {
  parent.replaceChildren();
  parent.hidden = !compared.length;
  if (!compared.length) return;
  html("h3", "", parent, "Pinned rollouts side by side");
  const table = html("table", "compared", html("div", "wide", parent));
  const heads = html("tr", "", html("thead", "", table));
  html("th", "", heads, "");
  for (const row of compared) {
    const head = html("th", row === selected ? "selected" : "", heads);
    head.scope = "col";
    const name = `${placeOf(data, data.group[row])} · #${data.sample_index[row]}`;
    button(head, name, () => choose(row), { title: "Show in the list", className: "plain" });
    button(head, "×", () => pin(row), { label: `Unpin ${describe(data, row)}`, className: "plain" });
  }
  const body = html("tbody", "", table);
  const text = (label, draw) => {
    const line = html("tr", "", body);
    html("th", "", line, label).scope = "row";
    for (const row of compared) draw(html("td", "", line), row);
  };
  text("reference", (cell, row) => drawTokens(cell, data, data.targets, data.group[row], () => ({ isTarget: true })));
  text("rollout", (cell, row) =>
    drawTokens(cell, data, data.tokens, row, (i, at) => ({ match: isMatch(data, row, i), cosine: data.cosines?.[at] })),
  );
  for (const { name, heading, digits, shared } of numbersOf(fields)) {
    const values = compared.map((row) => data.numbers[name][row]);
    const top = Math.max(...values.filter(Number.isFinite));
    const mark = !shared && values.some((value) => value < top);
    text(heading, (cell, row) => {
      const value = data.numbers[name][row];
      cell.className = mark && value === top ? "number best" : "number";
      cell.textContent = decimals(value, digits);
    });
  }
}

function drawTokens(parent, data, ids, row, look) {
  const box = html("span", "flow", parent);
  for (let i = 0; i < lengthOf(data, ids, row); i++) tokenCell(box, data, ids[row * data.width + i], look(i, row * data.width + i));
}

// -- table F.1 --------------------------------------------------------------------------------------------------------

/** Table F.1 of the first positions shown; `say` tells what became of copying. */
export function drawTableF1(parent, { data, rows }, { close, say }) {
  parent.replaceChildren();
  const top = html("div", "title", parent);
  html("h3", "", top, "Table F.1: cosine reward of rollouts and the ground truth");
  const table = tableF1(data, rows);
  const copy = async () => say((await copyText(markdownF1(table), parent)) ? "Table F.1 copied." : "The browser does not allow copying.");
  button(top, "Copy as Markdown", copy).disabled = !table.length;
  button(top, "Close", close);
  if (!table.length) {
    html("p", "note", parent, "No rollout is shown.");
    return;
  }
  const body = tableOf(parent, "f1", ["Example", "Type", "Text", "Cosine reward"]);
  for (const { example, type, text, value, best } of table) {
    const line = html("tr", type === "GT" ? "target" : "", body);
    html("th", "", line, example);
    html("td", "", line, type);
    html("td", "words", line, beginning(text, LONGEST_TEXT));
    html("td", best ? "number best" : "number", line, best ? `★ ${value}` : value);
  }
  html("p", "note", parent, "The first positions of the list with their first rollouts; ★ marks the highest of all rollouts of an example.");
}

// -- histogram --------------------------------------------------------------------------------------------------------

/** The rewards of all rollouts, pale; in front of them those that the list shows, and apart those of clicked positions. */
export function drawHistogram(figure, { data, ranked, rows, range }) {
  const picture = figure.querySelector("svg");
  picture.replaceChildren();
  const [low, high] = range ?? [0, 1];
  const clicked = (row) => data.clicked.has(data.group[row]);
  const all = Int32Array.from({ length: data.rows }, (_, row) => row).filter((row) => !clicked(row));
  const counted = (some) => histogram(ranked, some, low, high, BINS);
  const [whole, shown, apart] = [all, rows.filter((row) => !clicked(row)), rows.filter(clicked)].map(counted);
  const most = Math.max(1, ...whole.counts, ...apart.counts);
  const step = 200 / BINS;
  for (const [name, { counts }] of [["all", whole], ["shown", shown], ["clicked", apart]]) {
    counts.forEach((number, i) => {
      if (!number) return;
      const tall = Math.max((number / most) * 40, 1);
      const [from, to] = [i, i + 1].map((edge) => decimals(low + ((high - low) * edge) / BINS, 2));
      const bar = svg("rect", { class: name, x: i * step + 0.5, y: 42 - tall, width: step - 1, height: tall }, picture);
      svg("title", {}, bar, `${number.toLocaleString("en")} (${name}) with reward ${from} to ${to}`);
    });
  }
  const { mean, count } = whole;
  svg("line", { class: "base", x1: 0, x2: 200, y1: 42.5, y2: 42.5 }, picture);
  if (count) {
    const x = ((mean - low) / (high - low)) * 200;
    svg("line", { class: "mean", x1: x, x2: x, y1: 0, y2: 42 }, picture);
  }
  const [left, middle, right] = figure.querySelectorAll("figcaption span");
  left.textContent = range ? decimals(low, 2) : "";
  const part = shown.count === count ? "" : shown.count ? `; ${shown.count} shown: ${decimals(shown.mean)}` : "; none shown";
  middle.textContent = count ? `mean reward ${decimals(mean)}${part}` : "reward";
  right.textContent = range ? decimals(high, 2) : "";
  const words = `Rewards of ${count} rollouts from ${decimals(low, 2)} to ${decimals(high, 2)}, mean ${decimals(mean)}`;
  const others = apart.count ? `; ${apart.count} at clicked positions` : "";
  picture.setAttribute("aria-label", count ? `${words}${part}${others}` : "No rewards");
}
