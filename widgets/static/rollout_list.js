// The list of rollouts: a line a rollout under its position's target, only the lines in sight in the page.

import { isMatch, lengthOf, linesOf, textOf, visible, visibleParts } from "./rollout_data.js";
import { button, html, inFrames } from "./shared.js";

export const LINE = 26; // px, as in rollout_inspector.css
const TALLEST = 12_000_000; // px that a browser lays out well; longer lists scroll faster than they move
const LONGEST = 400; // characters of a token that its cell and its tooltip hold
const MARK = 34; // px of what stands before the tokens
const WIDTHS = { number: 56, best: 56, bar: 98 }; // px of a number's column

export function decimals(value, digits = 3) {
  return Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "–";
}

function sortLabel(title, name, [column, descending]) {
  if (column !== name) return `Sort by ${title}, highest first`;
  return descending ? `Sorted by ${title}, highest first; press for lowest first` : `Sorted by ${title}, lowest first; press for the original order`;
}

/** What a press on a column's head makes of the order: highest first, lowest first, as they came. */
export function nextSort([column, descending], name) {
  if (column !== name) return [name, true];
  return descending ? [name, false] : ["row", false];
}

/** The beginning of a text that is too long to lay out; whole characters. */
export function beginning(text, most = LONGEST) {
  return text.length <= most ? text : `${text.slice(0, most).replace(/[\ud800-\udbff]$/, "")}…`;
}

/** A token's cell: its text, a dot where it is the target's, a bar for its cosine. */
export function tokenCell(parent, data, token, { match = false, cosine = NaN, isTarget = false } = {}) {
  const cell = html("span", `token${match ? " match" : ""}${isTarget ? " true" : ""}`, parent);
  for (const [text, sign] of visibleParts(beginning(data.strings[token]))) html("span", sign ? "sign" : "", cell, text);
  if (Number.isFinite(cosine)) {
    const bar = html("span", cosine < 0 ? "bar below" : "bar", cell);
    bar.style.width = `${Math.min(Math.abs(cosine), 1) * 100}%`;
  }
  return cell;
}

/** A bar left or right of the middle, with the number. */
function signedBar(parent, value, most, digits) {
  const cell = html("span", "number signed", parent);
  const track = html("span", "track", cell);
  const bar = html("span", value < 0 ? "below" : "above", track);
  bar.style.width = `${most > 0 && Number.isFinite(value) ? (Math.min(Math.abs(value) / most, 1) * 50).toFixed(1) : 0}%`;
  html("span", "", cell, Number.isFinite(value) && value > 0 ? `+${decimals(value, digits)}` : decimals(value, digits));
}

/** Where a position is, in few words. */
export function placeOf(data, group) {
  return `step ${data.step[group]} · seq ${data.sequence_id[group]} · pos ${data.position[group]}`;
}

export function describe(data, row) {
  const at = data.group[row];
  const where = data.clicked.has(at) ? "clicked position" : "position";
  return `rollout ${data.sample_index[row]} at ${where} ${data.position[at]}, step ${data.step[at]}, sequence ${data.sequence_id[at]}`;
}

/** The list in `parent`. `on` has `sort(column)`, `choose(row)` and `pin(row)`; `show(state)` draws, with numbers of `fields`. */
export function rolloutList(parent, fields, on) {
  const scroller = html("div", "scroller", parent);
  const head = html("div", "head", scroller);
  const box = html("div", "lines", scroller);
  box.tabIndex = 0;
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", "Rollouts, below the reference of their position");
  const drawn = new Map();
  let state = null;
  const numbers = fields.filter(({ shared }) => !shared).map(({ look }) => WIDTHS[look]);
  const beside = numbers.reduce((sum, width) => sum + width, 0);
  scroller.style.setProperty("--columns", numbers.map((width) => `${width}px`).join(" "));
  scroller.style.setProperty("--beside", `${beside}px`);

  const heads = buildHead(head, fields, on);
  const height = () => Math.max(scroller.clientHeight - head.offsetHeight, LINE);
  /** The first line in sight, in lines, by the scroll position; the same unless the list is taller than a browser bears. */
  const rate = () => {
    const tall = state.lines.length * LINE;
    return tall <= TALLEST ? 1 : (tall - height()) / (TALLEST - height());
  };

  function show(next) {
    state = { ...next, lines: next.rows === state?.rows ? state.lines : linesOf(next.data, next.rows) };
    for (const node of drawn.values()) node.remove();
    drawn.clear();
    box.style.height = `${Math.min(state.lines.length * LINE, TALLEST)}px`;
    fit();
    for (const [name, button] of heads) {
      const [column, descending] = state.sort;
      button.dataset.sorted = column === name ? (descending ? "▼" : "▲") : "";
      button.setAttribute("aria-label", sortLabel(button.dataset.title, name, state.sort));
      button.setAttribute("aria-pressed", column === name);
    }
    paint();
  }

  /** Cells as wide as there is room, within reason; narrower ones scroll sideways. */
  function fit() {
    const room = (scroller.clientWidth - beside - MARK) / Math.max(state.data.width, 1);
    scroller.style.setProperty("--cell", `${Math.floor(Math.min(Math.max(room, 62), 110))}px`);
    scroller.style.setProperty("--tokens", state.data.width);
  }

  function paint() {
    if (!state) return;
    const top = Math.round(scroller.scrollTop * rate());
    const shift = top - scroller.scrollTop; // where lines are laid out away from their own place
    const first = Math.max(0, Math.floor(top / LINE) - 4);
    const last = Math.min(state.lines.length, Math.ceil((top + height()) / LINE) + 4);
    for (const [index, node] of drawn) {
      if (index >= first && index < last) continue;
      node.remove();
      drawn.delete(index);
    }
    for (let index = first; index < last; index++) {
      const node = drawn.get(index) ?? lineNode(index);
      const place = `${index * LINE - shift}px`;
      if (node.style.top !== place) node.style.top = place;
    }
  }

  function lineNode(index) {
    const line = state.lines[index];
    const node = line < 0 ? targetLine(box, state, -1 - line) : rolloutLine(box, state, line);
    drawn.set(index, node);
    if (line >= 0) mark(node, line);
    return node;
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

  /** Scroll so that the row, and where it is the first its target, is in sight. */
  function reveal(row) {
    const index = state.lines.indexOf(row);
    if (index < 0) return;
    const [top, now] = [Math.max(0, index - 1) * LINE, scroller.scrollTop * rate()];
    if (top < now) scroller.scrollTop = top / rate();
    else if ((index + 1) * LINE > now + height()) scroller.scrollTop = ((index + 1) * LINE - height()) / rate();
    paint();
  }

  const rowAt = (event) => {
    const node = event.target.closest(".rollout");
    return node ? Number(node.dataset.row) : -1;
  };
  const { schedule, cancel } = inFrames(paint);
  scroller.addEventListener("scroll", schedule);
  box.addEventListener("click", (event) => rowAt(event) >= 0 && on.choose(rowAt(event)));
  box.addEventListener("dblclick", (event) => rowAt(event) >= 0 && on.pin(rowAt(event)));
  const resized = new ResizeObserver(() => {
    if (!state) return;
    fit();
    schedule();
  });
  resized.observe(scroller);
  const page = () => Math.max(1, Math.floor(height() / LINE) - 2);
  const select = (selected, compared) => {
    Object.assign(state, { selected, compared });
    if (selected < 0) box.removeAttribute("aria-activedescendant");
    for (const [index, node] of drawn) if (state.lines[index] >= 0) mark(node, state.lines[index]);
  };
  const stop = () => {
    cancel();
    resized.disconnect();
  };
  return { box, show, select, reveal, page, stop };
}

function buildHead(head, fields, on) {
  const heads = new Map();
  html("span", "mark", head);
  const places = html("span", "places", head);
  html("span", "quiet", places, "sort by");
  const numbers = html("span", "numbers", head);
  for (const { name, label, about, shared } of fields) {
    const node = button(shared ? places : numbers, label, () => on.sort(name), { title: about, className: "sort" });
    Object.assign(node.dataset, { title: label, column: name });
    heads.set(name, node);
  }
  return heads;
}

function targetLine(parent, { data, fields }, group) {
  const node = html("div", "line target", parent);
  node.setAttribute("role", "presentation");
  html("span", "mark", node, "GT").title = "reference (ground truth)";
  const tokens = html("span", "tokens", node);
  for (let i = 0; i < lengthOf(data, data.targets, group); i++) tokenCell(tokens, data, data.targets[group * data.width + i], { isTarget: true });
  const clicked = data.clicked.has(group);
  node.classList.toggle("clicked", clicked);
  const shared = fields.filter((field) => field.shared && field.digits !== null);
  const facts = shared.map(({ name, label, digits }) => `${label} ${decimals(data.numbers[name][data.firstOf[group]], digits)}`);
  const where = [...(clicked ? ["clicked"] : []), placeOf(data, group), ...facts].join(" · ");
  html("span", "numbers where", node, where).title = where;
  return node;
}

function rolloutLine(parent, { data, fields, best, most }, row) {
  const node = html("div", "line rollout", parent);
  node.id = `${data.name}-${row}`;
  node.dataset.row = row;
  node.setAttribute("role", "option");
  const own = fields.filter(({ shared }) => !shared);
  const text = visible(beginning(textOf(data.strings, data.tokens, row * data.width, data.width)));
  const said = own.map(({ name, label, digits }) => `${label} ${decimals(data.numbers[name][row], digits)}`);
  node.setAttribute("aria-label", `${describe(data, row)}: ${text}; ${said.join(", ")}`);
  html("span", "mark", node);
  const tokens = html("span", "tokens", node);
  for (let i = 0; i < lengthOf(data, data.tokens, row); i++) {
    const at = row * data.width + i;
    const match = isMatch(data, row, i);
    const cell = tokenCell(tokens, data, data.tokens[at], { match, cosine: data.cosines?.[at] });
    const facts = [`logprob ${decimals(data.logprobs[at])}`];
    if (data.cosines) facts.push(`cosine ${decimals(data.cosines[at])}`);
    if (match) facts.push("matches the reference");
    cell.title = `${visible(beginning(data.strings[data.tokens[at]]))}\n${facts.join(" · ")}`;
  }
  const numbers = html("span", "numbers", node);
  for (const { name, look, digits } of own) {
    const value = data.numbers[name][row];
    if (look === "bar") signedBar(numbers, value, most[name], digits);
    else html("span", look === "best" && best[data.group[row]] === row ? "number best" : "number", numbers, decimals(value, digits));
  }
  return node;
}
