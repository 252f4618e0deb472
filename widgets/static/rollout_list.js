// The list of rollouts: one line per rollout below the target of its position; the page has only the visible lines.

import { hitsOf, isMatch, lengthOf, linesOf, markedParts, textOf, visible } from "./rollout_data.js";
import { button, clamp, html, inFrames, onceShown } from "./shared.js";

export const LINE = 26; // px, as in rollout_inspector.css
const TALLEST = 12_000_000; // px that a browser lays out well; in longer lists a pixel of scrolling moves several
const LONGEST = 400; // characters of a token that its cell and its tooltip hold
const MARK = 34; // px before the tokens
const PLACE = 52; // px of the position in a flat list, as in rollout_inspector.css
const NARROWEST = 62; // px of a token
const WIDTHS = { number: 56, best: 56, bar: 98 }; // px of a number's column

export const decimals = (value, digits = 3) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–");

function sortLabel(title, name, [column, descending]) {
  if (column !== name) return `Sort by ${title}, highest first`;
  const [order, next] = descending ? ["highest", "lowest first"] : ["lowest", "the original order"];
  return `Sorted by ${title}, ${order} first; press for ${next}`;
}

/** The order after a press on a column's head: highest first, lowest first, then the original order. */
export function nextSort([column, descending], name) {
  if (column !== name) return [name, true];
  return descending ? [name, false] : ["row", false];
}

/** The beginning of a text that is too long to lay out, in whole characters. */
export const beginning = (text, most = LONGEST) =>
  text.length <= most ? text : `${text.slice(0, most).replace(/[\ud800-\udbff]$/, "")}…`;

/** A token's cell: its text, a dot if it matches the target, a bar for its cosine. */
export function tokenCell(parent, data, token, { match = false, cosine = NaN, isTarget = false, hits = [] } = {}) {
  const cell = html("span", `token${match ? " match" : ""}${isTarget ? " true" : ""}`, parent);
  for (const [text, sign, hit] of markedParts(beginning(data.strings[token]), hits)) {
    html(hit ? "mark" : "span", sign ? "sign" : "", cell, text);
  }
  if (!data.strings[token]) html("span", "sign", cell, "…"); // a later token completes the character
  const style = `width: ${Math.min(Math.abs(cosine), 1) * 100}%`;
  if (Number.isFinite(cosine)) html("span", { class: cosine < 0 ? "bar below" : "bar", style }, cell);
  return cell;
}

/** The cells of a row of `tokens` or `targets`; `look(i, at)` returns the options of each. */
function tokenCells(parent, data, ids, row, look) {
  const first = row * data.width;
  const cell = (_, i) => tokenCell(parent, data, ids[first + i], look(i, first + i));
  return Array.from({ length: lengthOf(data, ids, row) }, cell);
}

/** The cells of a reference; occurrences of `wanted` are marked. */
export function targetCells(parent, data, group, wanted = "") {
  const hits = hitsOf(data, data.targets, group, wanted);
  return tokenCells(parent, data, data.targets, group, (i) => ({ isTarget: true, hits: hits[i] }));
}

/** The cells of a rollout, with the numbers of each token in its tooltip; occurrences of `wanted` are marked. */
export function rolloutCells(parent, data, row, wanted = "") {
  const hits = hitsOf(data, data.tokens, row, wanted);
  const look = (i, at) => ({ match: isMatch(data, row, i), cosine: data.cosines?.[at], hits: hits[i] });
  tokenCells(parent, data, data.tokens, row, look).forEach((cell, i) => {
    const at = row * data.width + i;
    const facts = [`logprob ${decimals(data.logprobs[at])}`];
    if (data.cosines) facts.push(`cosine ${decimals(data.cosines[at])}`);
    if (isMatch(data, row, i)) facts.push("matches the reference");
    cell.title = `${visible(beginning(data.strings[data.tokens[at]])) || "part of a character"}\n${facts.join(" · ")}`;
  });
}

/** A bar left or right of the middle, with the number. */
function signedBar(parent, value, most, digits) {
  const cell = html("span", "number signed", parent);
  const style = `width: ${most > 0 && Number.isFinite(value) ? (Math.min(Math.abs(value) / most, 1) * 50).toFixed(1) : 0}%`;
  html("span", { class: value < 0 ? "below" : "above", style }, html("span", "track", cell));
  html("span", "", cell, `${Number.isFinite(value) && value > 0 ? "+" : ""}${decimals(value, digits)}`);
}

/** A position in few words. A rollout begins at the token after its position, by which a document's map numbers it. */
export const placeOf = ({ explored, step, sequence_id, position }, group) =>
  explored
    ? `pos ${position[group]} · token ${position[group] + 1}`
    : `step ${step[group]} · seq ${sequence_id[group]} · pos ${position[group]}`;

export function describe(data, row) {
  const at = data.group[row];
  const where = data.clicked.has(at) ? "clicked position" : "position";
  const here = `rollout ${data.sample_index[row]} at ${where} ${data.position[at]}`;
  return `${here}, ${data.explored ? `from token ${data.position[at] + 1}` : `step ${data.step[at]}, sequence ${data.sequence_id[at]}`}`;
}

/** The list in `parent`, with numbers of `fields`. `on` has `sort(column)`, `choose(row)` and `pin(row)`; `show(state)` draws. */
export function rolloutList(parent, fields, on) {
  const scroller = html("div", "scroller", parent);
  const head = html("div", "head", scroller);
  const label = "Rollouts, below the reference of their position";
  const box = html("div", { class: "lines", tabindex: 0, role: "listbox", "aria-label": label }, scroller);
  const drawn = new Map();
  let state = null;
  const empty = html("p", { class: "empty", hidden: true }, parent, "No rollout passes the filters. Clear filters shows all of them.");
  let endWaiting = () => {};
  let numbers = [];

  const heads = buildHead(head, fields, on);
  const height = () => Math.max(scroller.clientHeight - head.offsetHeight, LINE);
  /** Pixels of the list per pixel of scrolling: 1, unless the list is taller than a browser lays out. */
  const rate = () => {
    const tall = state.lines.length * LINE;
    return tall <= TALLEST ? 1 : (tall - height()) / (TALLEST - height());
  };

  function show(next) {
    state = { ...next, lines: linesOf(next.data, next.rows, next.flat) };
    empty.hidden = state.rows.length > 0 || !state.data.rows;
    numbers = fields.filter(({ shared, name }) => !shared && !state.hidden.has(name)).map(({ look }) => WIDTHS[look]);
    box.replaceChildren();
    box.removeAttribute("aria-activedescendant"); // of a line that is no longer there
    drawn.clear();
    box.style.height = `${Math.min(state.lines.length * LINE, TALLEST)}px`;
    fit();
    const [column, descending] = state.sort;
    for (const [name, button] of heads) {
      button.dataset.sorted = column === name ? (descending ? "▼" : "▲") : "";
      button.setAttribute("aria-label", sortLabel(button.dataset.title, name, state.sort));
      button.setAttribute("aria-pressed", column === name);
      button.hidden = state.hidden.has(name);
    }
    paint();
  }

  /** Fits the width of cells to the room, within limits; the list scrolls sideways if that is not enough. */
  function fit() {
    const beside = numbers.reduce((sum, width) => sum + width, 0);
    const before = MARK + (state.flat ? PLACE : 0);
    const tight = scroller.clientWidth < before + NARROWEST * Math.min(state.data.width, 5) + beside;
    const shown = tight ? [WIDTHS.best] : numbers; // beside few pixels of tokens only the reward, the rest in the detail
    const taken = shown.reduce((sum, width) => sum + width, 0);
    scroller.classList.toggle("tight", tight);
    scroller.style.setProperty("--columns", shown.map((width) => `${width}px`).join(" "));
    scroller.style.setProperty("--beside", `${taken}px`);
    const room = (scroller.clientWidth - taken - before) / Math.max(state.data.width, 1);
    scroller.style.setProperty("--cell", `${Math.floor(clamp(room, NARROWEST, 110))}px`);
    scroller.style.setProperty("--tokens", state.data.width);
  }

  function paint() {
    if (!state) return;
    endWaiting();
    if (!scroller.clientHeight) {
      endWaiting = onceShown(scroller, schedule); // hidden, as for a moment while JupyterLab changes its theme: no lines are in view
      return;
    }
    const top = Math.round(scroller.scrollTop * rate());
    const shift = top - scroller.scrollTop; // the offset between lines and their places in the box
    const first = Math.max(0, Math.floor(top / LINE) - 4);
    const last = Math.min(state.lines.length, Math.ceil((top + height()) / LINE) + 4);
    for (const [index, node] of drawn) {
      if (index >= first && index < last) continue;
      if (box.getAttribute("aria-activedescendant") === node.id) box.removeAttribute("aria-activedescendant");
      node.remove();
      drawn.delete(index);
    }
    for (let index = first; index < last; index++) {
      const line = state.lines[index];
      if (!drawn.has(index)) {
        drawn.set(index, line < 0 ? targetLine(box, state, -1 - line) : rolloutLine(box, state, line));
        if (line >= 0) mark(drawn.get(index), line);
      }
      const { style } = drawn.get(index);
      const place = `${index * LINE - shift}px`;
      if (style.top !== place) style.top = place;
    }
  }

  function mark(node, row) {
    const chosen = row === state.selected;
    const pinned = state.compared.includes(row);
    node.classList.toggle("selected", chosen);
    node.setAttribute("aria-selected", chosen);
    node.firstChild.textContent = pinned ? "◆" : state.data.sample_index[row];
    node.firstChild.title = pinned ? "pinned for comparison" : "sample index at this position";
    if (chosen) box.setAttribute("aria-activedescendant", node.id);
  }

  /** Scrolls so that the row is visible, and the line above it too. */
  function reveal(row) {
    const index = state.lines.indexOf(row);
    if (index < 0) return;
    const [top, now] = [Math.max(0, index - 1) * LINE, scroller.scrollTop * rate()];
    if (top < now) scroller.scrollTop = top / rate();
    else if ((index + 1) * LINE > now + height()) scroller.scrollTop = ((index + 1) * LINE - height()) / rate();
    paint();
  }

  const onRow = (act) => (event) => {
    const node = event.target.closest(".rollout");
    if (node) act(Number(node.dataset.row));
  };
  const schedule = inFrames(paint);
  scroller.addEventListener("scroll", schedule);
  box.addEventListener("click", onRow(on.choose));
  box.addEventListener("dblclick", onRow(on.pin));
  const resized = new ResizeObserver(() => {
    if (!state) return;
    fit();
    schedule();
  });
  resized.observe(scroller);
  const page = () => Math.max(1, Math.floor(height() / LINE) - 2);
  const select = (selected, compared) => {
    Object.assign(state, { selected, compared });
    box.removeAttribute("aria-activedescendant"); // set again if the line is drawn
    for (const [index, node] of drawn) if (state.lines[index] >= 0) mark(node, state.lines[index]);
  };
  return { box, show, select, reveal, page, ends: [schedule.cancel, () => resized.disconnect(), () => endWaiting()] };
}

function buildHead(head, fields, on) {
  html("span", "mark", head);
  const places = html("span", "places", head);
  html("span", "quiet", places, "sort by");
  const numbers = html("span", "numbers", head);
  const heads = fields.map(({ name, label, about, shared, look }) => {
    const data = { class: look === "best" ? "sort ranked" : "sort", title: about, "data-title": label, "data-column": name };
    return [name, button(shared ? places : numbers, label, () => on.sort(name), data)];
  });
  return new Map(heads);
}

function targetLine(parent, { data, fields, filters }, group) {
  const clicked = data.clicked.has(group);
  const node = html("div", { class: `line target${clicked ? " clicked" : ""}`, role: "presentation" }, parent);
  html("span", { class: "mark", title: "reference" }, node, "ref");
  targetCells(html("span", "tokens", node), data, group, filters.target);
  const shared = fields.filter((field) => field.shared && field.digits !== null);
  const facts = shared.map(({ name, label, digits }) => `${label} ${decimals(data.numbers[name][data.firstOf[group]], digits)}`);
  const where = [...(clicked ? ["clicked"] : []), placeOf(data, group), ...facts].join(" · ");
  html("span", { class: "numbers where", title: where, "data-position": `pos ${data.position[group]}` }, node, where);
  return node;
}

const numberClass = (ranked, best) => `number${ranked ? " ranked" : ""}${ranked && best ? " best" : ""}`;

function rolloutLine(parent, { data, fields, filters, hidden, flat, best, most }, row) {
  const own = fields.filter(({ shared, name }) => !shared && !hidden.has(name));
  const text = visible(beginning(textOf(data.strings, data.tokens, row * data.width, data.width)));
  const values = own.map(({ name, label, digits }) => `${label} ${decimals(data.numbers[name][row], digits)}`);
  const label = `${describe(data, row)}: ${text}; ${values.join(", ")}`;
  const attributes = { id: `${data.name}-${row}`, "data-row": row, role: "option", "aria-label": label };
  const clicked = flat && data.clicked.has(data.group[row]) ? " clicked" : "";
  const node = html("div", { class: `line rollout${clicked}`, ...attributes }, parent);
  html("span", "mark", node);
  if (flat) {
    const reference = visible(beginning(textOf(data.strings, data.targets, data.group[row] * data.width, data.width)));
    html("span", { class: "place", title: `${placeOf(data, data.group[row])}\nreference: ${reference}` }, node, data.position[data.group[row]]);
  }
  rolloutCells(html("span", "tokens", node), data, row, filters.text);
  const numbers = html("span", "numbers", node);
  for (const { name, look, digits } of own) {
    const value = data.numbers[name][row];
    if (look === "bar") signedBar(numbers, value, most[name], digits);
    else html("span", numberClass(look === "best", best[data.group[row]] === row), numbers, decimals(value, digits));
  }
  return node;
}
