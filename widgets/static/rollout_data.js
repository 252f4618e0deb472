// Rollouts as columns: unpacked, filtered, sorted, grouped by position, tabulated; nothing here draws. The module docstring of
// widgets/parts/rollout_columns.py, whose Python does the same, defines which rollouts are listed, and in which order.

import { clamp, floats, typed } from "./shared.js";

const WHITE_SIGNS = { " ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍" };
const INVISIBLE = /(^ +| +$| {2,}|[\p{Cc}\p{Cf}\p{Zl}\p{Zp}])/u;
const MARKDOWN_MARKS = /[\\`*_[\]<>|~$&#!]/g;

const INTEGERS = { group: Int32Array, sample_index: Int32Array, step: Int32Array, position: Int32Array };
const KINDS = { ...INTEGERS, sequence_id: Float64Array, logprobs: Float32Array };

/** The `columns` trait as typed arrays; a token is an index into `strings`, 0 for none. */
export function unpackRollouts({ rows = 0, groups = 0, width = 0, prefix = 0, strings = [""], bases = [], ...columns }) {
  const small = strings.length <= 2 ** 16 ? Uint16Array : Uint32Array;
  const data = { rows, groups, width, prefix, strings, bases, orders: new Map(), texts: {}, numbers: {} };
  for (const [name, Kind] of Object.entries({ tokens: small, targets: small, prefixes: small, ...KINDS })) {
    data[name] = typed(columns[name], Kind) ?? new Kind(0);
  }
  for (const [name, view] of Object.entries(columns.numbers ?? {})) data.numbers[name] = floats(view);
  data.cosines = floats(columns.cosines);
  data.clicked = new Set(columns.clicked); // the positions that the user clicked
  data.explored = rows > 0 && !data.step.some(Boolean) && !data.sequence_id.some(Boolean); // rollouts of no run
  data.firstOf = new Int32Array(groups); // the first row of each position
  for (let row = rows - 1; row >= 0; row--) data.firstOf[data.group[row]] = row;
  return data;
}

// -- text -------------------------------------------------------------------------------------------------------------

const signOf = (character) => WHITE_SIGNS[character] ?? `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}`;

/** The text on one line in parts: [text, whether it is a sign for something invisible]. */
export const visibleParts = (text) => markedParts(text, []).map(([part, sign]) => [part, sign]);

/** The same parts, cut where one of the ranges `hits` begins or ends: [text, whether it is a sign, whether it is in a hit]. */
export function markedParts(text, hits) {
  const found = [];
  let place = 0;
  text.split(INVISIBLE).forEach((part, i) => {
    const end = place + part.length;
    const cuts = hits.flat().filter((cut) => cut > place && cut < end);
    const bounds = [place, ...cuts.sort((a, b) => a - b), end];
    bounds.slice(1).forEach((stop, j) => {
      const piece = text.slice(bounds[j], stop);
      const hit = hits.some(([first, last]) => first <= bounds[j] && stop <= last);
      if (piece) found.push([i % 2 ? piece.replace(/./gsu, signOf) : piece, i % 2 === 1, hit]);
    });
    place = end;
  });
  return found;
}

/** Where `wanted` occurs in the text of a row of `tokens` or `targets`: by token, its ranges [first, last) of the token's string. */
export function hitsOf({ strings, width }, ids, row, wanted) {
  const part = fold(wanted ?? "");
  const found = Array.from({ length: width }, () => []);
  if (!part) return found;
  const text = fold(textOf(strings, ids, row * width, width));
  for (let at = text.indexOf(part); at >= 0; at = text.indexOf(part, at + part.length)) {
    let start = 0;
    for (let i = 0; i < width; i++) {
      const length = strings[ids[row * width + i]].length;
      const range = [Math.max(at - start, 0), Math.min(at + part.length - start, length)];
      if (range[0] < range[1]) found[i].push(range);
      start += length;
    }
  }
  return found;
}

/** The same as one string, as in widgets.figures.tables.visible. */
export const visible = (text) => visibleParts(text).map(([part]) => part).join("");

/** The text with capital ASCII letters as small ones. */
const fold = (text) => text.replace(/[A-Z]+/g, (letters) => letters.toLowerCase());

export function textOf(strings, ids, start, width) {
  let text = "";
  for (let i = start; i < start + width; i++) text += strings[ids[i]];
  return text;
}

function foldedTexts(data, name) {
  if (!data.texts[name]) {
    data.folded ??= data.strings.map(fold);
    const [ids, length] = name === "text" ? [data.tokens, data.rows] : [data.targets, data.groups];
    data.texts[name] = Array.from({ length }, (_, i) => textOf(data.folded, ids, i * data.width, data.width));
  }
  return data.texts[name];
}

/** Number of tokens of a row of `tokens` or `targets`. */
export function lengthOf({ width }, ids, row) {
  const length = ids.subarray(row * width, (row + 1) * width).indexOf(0);
  return length < 0 ? width : length;
}

/** The index that all strings of one token stand for. */
const baseOf = ({ strings, bases }, index) => bases[index - strings.length + bases.length] ?? index;

export function isMatch(data, row, i) {
  const token = baseOf(data, data.tokens[row * data.width + i]);
  return token !== 0 && token === baseOf(data, data.targets[data.group[row] * data.width + i]);
}

// -- filters and order ------------------------------------------------------------------------------------------------

/** The value of a row in a column, as a function. */
function columnOf(data, name) {
  if (name in data.numbers) return (row) => data.numbers[name][row];
  return name === "row" ? (row) => row : (row) => data[name][data.group[row]];
}

/** All rows sorted by one column, which is stable; NaN comes last. */
function rowsSorted(data, name, descending) {
  const key = `${name} ${descending}`;
  if (data.orders.has(key)) return data.orders.get(key);
  const value = columnOf(data, name);
  const real = name in data.numbers;
  const bits = new Int32Array(1);
  const cell = new Float32Array(bits.buffer);
  const words = new Uint32Array(2 * data.rows); // the row and its rank: together a 64-bit integer to sort by
  for (let row = 0; row < data.rows; row++) {
    let rank = value(row);
    if (real) {
      cell[0] = rank + 0; // -0 is 0
      rank = bits[0] < 0 ? -1 - (bits[0] & 0x7fffffff) : bits[0];
    }
    words[2 * row] = row;
    words[2 * row + 1] = Number.isNaN(cell[0]) ? 2 ** 32 - 1 : descending ? 2 ** 31 - 1 - rank : rank + 2 ** 31;
  }
  new BigUint64Array(words.buffer).sort();
  data.orders.set(key, new Uint32Array(data.rows).map((_, i) => words[2 * i]));
  return data.orders.get(key);
}

function rowsKept(data, filters) {
  const keep = new Uint8Array(data.rows).fill(1);
  for (const [name, wanted] of Object.entries(filters)) {
    if (typeof wanted === "string") {
      const part = fold(wanted);
      const has = Uint8Array.from(foldedTexts(data, name), (text) => text.includes(part));
      for (let row = 0; row < data.rows; row++) keep[row] &= has[name === "text" ? row : data.group[row]];
      continue;
    }
    const rounded = name in data.numbers ? Math.fround : Number;
    const [low, high] = wanted.map((bound) => (bound === null ? null : rounded(bound)));
    const value = columnOf(data, name);
    for (let row = 0; row < data.rows; row++) {
      const x = value(row);
      if ((low !== null && !(x >= low)) || (high !== null && !(x <= high))) keep[row] = 0;
    }
  }
  return keep;
}

/** The rows that pass the filters, in the order of the list. */
export function shownRows(data, filters, [name, descending], flat = false) {
  const keep = rowsKept(data, filters);
  const order = rowsSorted(data, name, descending);
  if (flat) return Int32Array.from(order.filter((row) => keep[row]));
  const index = new Int32Array(data.groups); // by position: first the number of its rollouts, then the place of its next one
  const places = [];
  for (const row of order) if (keep[row] && index[data.group[row]]++ === 0) places.push(data.group[row]);
  let sum = 0;
  for (const group of places) [index[group], sum] = [sum, sum + index[group]];
  const rows = new Int32Array(sum);
  for (const row of order) if (keep[row]) rows[index[data.group[row]]++] = row;
  return rows;
}

/** Lines of the list: a row, or -1 - g for the target of position g, which is above its rollouts unless the list is flat. */
export function linesOf(data, rows, flat = false) {
  if (flat) return rows;
  const lines = new Int32Array(2 * rows.length);
  let [count, group] = [0, -1];
  for (const row of rows) {
    if (data.group[row] !== group) lines[count++] = -1 - (group = data.group[row]);
    lines[count++] = row;
  }
  return lines.slice(0, count);
}

/** Number of the rows' finite values in each of `bins` equal parts of [low, high], their mean, and their number. */
export function histogram(values, rows, low, high, bins) {
  const counts = new Array(bins).fill(0);
  let [sum, count] = [0, 0];
  for (const row of rows) {
    const value = values[row];
    if (!Number.isFinite(value)) continue;
    counts[clamp(Math.floor(((value - low) / (high - low)) * bins), 0, bins - 1)]++;
    sum += value;
    count++;
  }
  return { counts, mean: sum / count, count };
}

/** The row with the highest finite value of each position; -1 for a position with one rollout. */
export function bestRows(data, values, rows) {
  const best = new Int32Array(data.groups).fill(-1);
  const count = new Int32Array(data.groups);
  for (const row of rows) {
    const group = data.group[row];
    count[group]++;
    if (Number.isFinite(values[row]) && !(values[best[group]] >= values[row])) best[group] = row;
  }
  return best.map((row, group) => (count[group] > 1 ? row : -1));
}

// -- table F.1 --------------------------------------------------------------------------------------------------------

/**
 * The first listed positions with different targets: {example, type, text, value, best}. Each has its first rollouts and, if
 * it is another one, the rollout with the highest cosine reward of all its rollouts, which is starred.
 */
export function tableF1(data, rows, examples = 6, samples = 4) {
  const chosen = new Map();
  for (const row of rows) {
    if (chosen.size === examples) break;
    const group = data.group[row];
    const target = data.targets.subarray(group * data.width, (group + 1) * data.width).join();
    if (!chosen.has(target)) chosen.set(target, group);
  }
  const members = new Map([...chosen.values()].map((group) => [group, []]));
  for (let row = 0; row < data.rows; row++) members.get(data.group[row])?.push(row);
  const textAt = (ids, i) => visible(textOf(data.strings, ids, i * data.width, data.width));
  return [...members].flatMap(([group, all], index) => {
    all.sort((a, b) => data.sample_index[a] - data.sample_index[b] || a - b);
    const cosine = (row) => data.numbers.cosine[row];
    const finite = all.filter((row) => Number.isFinite(cosine(row)));
    const top = finite.length > 1 ? finite.reduce((top, row) => (cosine(row) > cosine(top) ? row : top)) : -1;
    const target = { example: `Ex. ${index + 1}`, type: "GT", text: textAt(data.targets, group), value: "–", best: false };
    const lines = all.map((row, place) => {
      const value = Number.isFinite(cosine(row)) ? cosine(row).toFixed(3) : "–";
      return { example: "", type: `P${place + 1}`, text: textAt(data.tokens, row), value, best: row === top };
    });
    return [target, ...lines.filter(({ best }, place) => place < samples || best)];
  });
}

/** Table F.1 in Markdown, with the text of models escaped. */
export function markdownF1(table) {
  const lines = ["| Example | Type | Text | Cosine reward |", "|---|---|---|---|"];
  for (const { example, type, text, value, best } of table) {
    lines.push(`| ${example} | ${type} | ${text.replace(MARKDOWN_MARKS, "\\$&")} | ${best ? `**${value}** ★` : value} |`);
  }
  return `${lines.join("\n")}\n`;
}
