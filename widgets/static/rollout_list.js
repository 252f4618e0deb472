// The list of rollouts: a line a rollout under its position's truth, only the lines in sight in the page.

import { isMatch, lengthOf, linesOf, textOf, visible, visibleParts } from "./rollout_data.js";
import { html } from "./shared.js";

export const LINE = 26; // px, as in rollout_inspector.css
const TALLEST = 12_000_000; // px that a browser lays out well; longer lists scroll faster than they move
const LONGEST = 400; // characters of a token that its cell and its tooltip hold
const ALONGSIDE = 352; // px of marks and numbers beside the tokens
const NUMBER_COLUMNS = [
  ["reward", "reward", "Training reward; bold: the highest at its position"],
  ["advantage", "advantage", "Advantage, with a bar from 0"],
  ["cosine", "cosine", "Cosine similarity with the hidden states of the reference"],
  ["binary", "match", "Exact-match rate: share of tokens that equal the reference"],
  ["logprob", "log p", "Sum of the tokens' logprobs, nats"],
];
const PLACE_COLUMNS = [
  ["step", "step"],
  ["position", "position"],
  ["entropy", "entropy"],
];

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

/** A token's cell: its text, a dot where it is the truth's, a bar for its cosine. */
export function tokenCell(parent, data, token, { match = false, cosine = NaN, truth = false } = {}) {
  const cell = html("span", `token${match ? " match" : ""}${truth ? " true" : ""}`, parent);
  for (const [text, sign] of visibleParts(beginning(data.strings[token]))) html("span", sign ? "sign" : "", cell, text);
  if (Number.isFinite(cosine)) {
    const bar = html("span", cosine < 0 ? "bar below" : "bar", cell);
    bar.style.width = `${Math.min(Math.abs(cosine), 1) * 100}%`;
  }
  return cell;
}

/** A bar left or right of the middle, with the number. */
export function signedBar(parent, value, most) {
  const cell = html("span", "number advantage", parent);
  const track = html("span", "track", cell);
  const bar = html("span", value < 0 ? "below" : "above", track);
  bar.style.width = `${most > 0 && Number.isFinite(value) ? (Math.min(Math.abs(value) / most, 1) * 50).toFixed(1) : 0}%`;
  html("span", "", cell, Number.isFinite(value) && value > 0 ? `+${decimals(value, 2)}` : decimals(value, 2));
}

export function describe(data, row) {
  const at = data.group[row];
  const where = data.clicked.has(at) ? "clicked position" : "position";
  return `rollout ${data.member[row]} at ${where} ${data.position[at]}, step ${data.step[at]}, sequence ${data.sequence_id[at]}`;
}

/** The list in `parent`. `on` has `sort(column)`, `choose(row)` and `pin(row)`; `show(state)` draws. */
export function rolloutList(parent, on) {
  const scroller = html("div", "scroller", parent);
  const head = html("div", "head", scroller);
  const box = html("div", "lines", scroller);
  box.tabIndex = 0;
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", "Rollouts, below the reference of their position");
  const drawn = new Map();
  let state = null;
  let frame = 0;

  const heads = buildHead(head, on);
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
    const room = (scroller.clientWidth - ALONGSIDE) / Math.max(state.data.width, 1);
    scroller.style.setProperty("--cell", `${Math.floor(Math.min(Math.max(room, 62), 110))}px`);
    scroller.style.setProperty("--tokens", state.data.width);
  }

  function paint() {
    frame = 0;
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
    const node = line < 0 ? truthLine(box, state, -1 - line) : rolloutLine(box, state, line);
    drawn.set(index, node);
    if (line >= 0) mark(node, line);
    return node;
  }

  function mark(node, row) {
    const chosen = row === state.selected;
    const pinned = state.compared.includes(row);
    node.classList.toggle("selected", chosen);
    node.setAttribute("aria-selected", chosen);
    node.firstChild.textContent = pinned ? "◆" : state.data.member[row];
    node.firstChild.title = pinned ? "pinned for comparison" : "sample index at this position";
    if (chosen) box.setAttribute("aria-activedescendant", node.id);
  }

  /** Scroll so that the row, and where it is the first its truth, is in sight. */
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
  scroller.addEventListener("scroll", () => (frame ||= requestAnimationFrame(paint)));
  box.addEventListener("click", (event) => rowAt(event) >= 0 && on.choose(rowAt(event)));
  box.addEventListener("dblclick", (event) => rowAt(event) >= 0 && on.pin(rowAt(event)));
  const resized = new ResizeObserver(() => {
    if (!state) return;
    fit();
    frame ||= requestAnimationFrame(paint);
  });
  resized.observe(scroller);
  const page = () => Math.max(1, Math.floor(height() / LINE) - 2);
  const select = (selected, compared) => {
    Object.assign(state, { selected, compared });
    if (selected < 0) box.removeAttribute("aria-activedescendant");
    for (const [index, node] of drawn) if (state.lines[index] >= 0) mark(node, state.lines[index]);
  };
  const stop = () => {
    cancelAnimationFrame(frame);
    resized.disconnect();
  };
  return { box, show, select, reveal, page, stop };
}

function buildHead(head, on) {
  const heads = new Map();
  const button = (parent, name, title, hint) => {
    const node = html("button", "sort", parent, title);
    node.type = "button";
    node.dataset.title = title;
    node.dataset.column = name;
    if (hint) node.title = hint;
    node.addEventListener("click", () => on.sort(name));
    heads.set(name, node);
  };
  html("span", "mark", head);
  const places = html("span", "places", head);
  html("span", "quiet", places, "sort by");
  for (const [name, title] of PLACE_COLUMNS) button(places, name, title);
  const numbers = html("span", "numbers", head);
  for (const [name, title, hint] of NUMBER_COLUMNS) button(numbers, name, title, hint);
  return heads;
}

function truthLine(parent, { data }, group) {
  const node = html("div", "line truth", parent);
  node.setAttribute("role", "presentation");
  html("span", "mark", node, "GT").title = "reference (ground truth)";
  const tokens = html("span", "tokens", node);
  for (let i = 0; i < lengthOf(data, data.targets, group); i++) tokenCell(tokens, data, data.targets[group * data.width + i], { truth: true });
  const row = data.firstOf[group];
  const facts = [`step ${data.step[group]}`, `seq ${data.sequence_id[group]}`, `pos ${data.position[group]}`];
  if (data.clicked.has(group)) {
    node.classList.add("clicked");
    facts.unshift("clicked");
  }
  html("span", "numbers where", node, `${facts.join(" · ")} · H ${decimals(data.numbers.entropy[row], 2)}`).title =
    `step ${data.step[group]}, sequence ${data.sequence_id[group]}, position ${data.position[group]}, entropy ${decimals(data.numbers.entropy[row])} nats`;
  return node;
}

function rolloutLine(parent, { data, best, most }, row) {
  const node = html("div", "line rollout", parent);
  node.id = `${data.name}-${row}`;
  node.dataset.row = row;
  node.setAttribute("role", "option");
  const { reward, cosine, binary, logprob, advantage } = data.numbers;
  const text = visible(beginning(textOf(data.strings, data.tokens, row * data.width, data.width)));
  node.setAttribute("aria-label", `${describe(data, row)}: ${text}; reward ${decimals(reward[row])}, advantage ${decimals(advantage[row], 2)}`);
  html("span", "mark", node);
  const tokens = html("span", "tokens", node);
  for (let i = 0; i < lengthOf(data, data.tokens, row); i++) {
    const at = row * data.width + i;
    const cell = tokenCell(tokens, data, data.tokens[at], { match: isMatch(data, row, i), cosine: data.cosines ? data.cosines[at] : NaN });
    const facts = [`logprob ${decimals(data.logprobs[at])}`];
    if (data.cosines) facts.push(`cosine ${decimals(data.cosines[at])}`);
    if (isMatch(data, row, i)) facts.push("matches the reference");
    cell.title = `${visible(beginning(data.strings[data.tokens[at]]))}\n${facts.join(" · ")}`;
  }
  const numbers = html("span", "numbers", node);
  html("span", best[data.group[row]] === row ? "number best" : "number", numbers, decimals(reward[row]));
  signedBar(numbers, advantage[row], most);
  for (const [values, digits] of [[cosine, 3], [binary, 2], [logprob, 2]]) html("span", "number", numbers, decimals(values[row], digits));
  return node;
}
