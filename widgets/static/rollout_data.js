// Rollouts as columns: unpacked, filtered, sorted, put together by position, tabulated. No drawing here. What is shown, and in
// which order, is written down in widgets/parts/rollout_columns.py, whose Python does the same.

import { floats, typed } from "./shared.js";

const WHITE_SIGNS = { "\n": "⏎", "\t": "⇥", "\r": "␍" };
const MARKDOWN_MARKS = /[\\`*_[\]<>|~$&#!]/g;

/** The `columns` trait as typed arrays; a token is an index into `strings`, 0 where there is none. */
export function unpackRollouts(columns) {
  const small = (columns.strings?.length ?? 0) <= 2 ** 16 ? Uint16Array : Uint32Array;
  const { rows = 0, groups = 0, width = 0, prefix = 0, strings = [""] } = columns;
  const data = { rows, groups, width, prefix, strings, orders: new Map(), texts: {} };
  const kinds = { tokens: small, targets: small, prefixes: small, group: Int32Array, sample_index: Int32Array, step: Int32Array, position: Int32Array, sequence_id: Float64Array, logprobs: Float32Array };
  for (const [name, Kind] of Object.entries(kinds)) data[name] = typed(columns[name], Kind) ?? new Kind(0);
  data.numbers = Object.fromEntries(Object.entries(columns.numbers ?? {}).map(([name, view]) => [name, floats(view)]));
  data.cosines = floats(columns.cosines);
  data.clicked = new Set(columns.clicked ?? []); // positions that are there because they were clicked
  data.firstOf = new Int32Array(data.groups); // a row of each position
  for (let row = data.rows - 1; row >= 0; row--) data.firstOf[data.group[row]] = row;
  return data;
}

// -- text -------------------------------------------------------------------------------------------------------------

/** `text` on one line, what cannot be seen shown, as widgets.figures.tables.visible does. */
export function visible(text) {
  return text
    .replace(/^ +| +$| {2,}/g, (spaces) => "·".repeat(spaces.length))
    .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (sign) => WHITE_SIGNS[sign] ?? `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`);
}

/** The visible form in parts, [text, whether it is a sign for what cannot be seen]. */
export function visibleParts(text) {
  const found = text.matchAll(/(?<sign>^ +| +$| {2,}|[\p{Cc}\p{Cf}\p{Zl}\p{Zp}])|(?:[^ \p{Cc}\p{Cf}\p{Zl}\p{Zp}]|(?<=[^ ]) (?=[^ ]))+/gu);
  return [...found].map((part) => [part.groups.sign ? visible(part.groups.sign) : part[0], Boolean(part.groups.sign)]);
}

/** Capital ASCII letters as small ones, every other character as it is. */
export function fold(text) {
  return text.replace(/[A-Z]+/g, (letters) => letters.toLowerCase());
}

export function textOf(strings, ids, start, width) {
  let text = "";
  for (let i = start; i < start + width; i++) text += strings[ids[i]];
  return text;
}

function foldedTexts(data, name) {
  if (!data.texts[name]) {
    data.folded ??= data.strings.map(fold);
    const [ids, count] = name === "text" ? [data.tokens, data.rows] : [data.targets, data.groups];
    data.texts[name] = Array.from({ length: count }, (_, i) => textOf(data.folded, ids, i * data.width, data.width));
  }
  return data.texts[name];
}

/** Number of tokens of a row of `tokens` or `targets`. */
export function lengthOf(data, ids, row) {
  let length = 0;
  while (length < data.width && ids[row * data.width + length]) length++;
  return length;
}

export function isMatch(data, row, i) {
  const token = data.tokens[row * data.width + i];
  return token !== 0 && token === data.targets[data.group[row] * data.width + i];
}

// -- what is shown ----------------------------------------------------------------------------------------------------

/** Value of a row in a column to filter or sort by. */
export function columnOf(data, name) {
  if (name in data.numbers) return (row) => data.numbers[name][row];
  return name === "row" ? (row) => row : (row) => data[name][data.group[row]];
}

/** [R] whole numbers from 0 that are ordered as the rows are to be: what is not a number is the highest. */
function sortRanks(data, name, descending) {
  const value = columnOf(data, name);
  const ranks = new Uint32Array(data.rows);
  const cell = new Float32Array(1);
  const bits = new Int32Array(cell.buffer);
  const real = name in data.numbers;
  for (let row = 0; row < data.rows; row++) {
    let rank = value(row);
    if (real) {
      cell[0] = rank + 0; // -0 is 0
      rank = bits[0] < 0 ? -1 - (bits[0] & 0x7fffffff) : bits[0];
    }
    ranks[row] = Number.isNaN(cell[0]) ? 2 ** 32 - 1 : descending ? 2 ** 31 - 1 - rank : rank + 2 ** 31;
  }
  return ranks;
}

/** All rows by one column: what is not a number last, equal ones as they came. */
function rowsSorted(data, name, descending) {
  const key = `${name} ${descending}`;
  if (data.orders.has(key)) return data.orders.get(key);
  const ranks = sortRanks(data, name, descending);
  let order = Int32Array.from(ranks.keys());
  for (const shift of [0, 11, 22]) order = sortedByDigit(order, ranks, shift); // the lowest digit first, each stable
  data.orders.set(key, order);
  return order;
}

function sortedByDigit(order, ranks, shift) {
  const next = new Int32Array(2049);
  for (let i = 0; i < order.length; i++) next[((ranks[i] >>> shift) & 2047) + 1]++;
  for (let digit = 1; digit < 2049; digit++) next[digit] += next[digit - 1];
  const sorted = new Int32Array(order.length);
  for (let i = 0; i < order.length; i++) sorted[next[(ranks[order[i]] >>> shift) & 2047]++] = order[i];
  return sorted;
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

/** The rows that pass, in the order shown. */
export function shownRows(data, filters, [name, descending]) {
  const keep = rowsKept(data, filters);
  const order = rowsSorted(data, name, descending);
  const counts = new Int32Array(data.groups);
  const places = [];
  for (let i = 0; i < order.length; i++) {
    if (keep[order[i]] && counts[data.group[order[i]]]++ === 0) places.push(data.group[order[i]]);
  }
  const next = new Int32Array(data.groups); // where a position's next rollout stands
  let sum = 0;
  for (const group of places) {
    next[group] = sum;
    sum += counts[group];
  }
  const rows = new Int32Array(sum);
  for (let i = 0; i < order.length; i++) if (keep[order[i]]) rows[next[data.group[order[i]]]++] = order[i];
  return rows;
}

/** Lines of the list: a row, or -1 - g where position g's target stands above its rollouts. */
export function linesOf(data, rows) {
  const lines = new Int32Array(2 * rows.length);
  let [count, group] = [0, -1];
  for (const row of rows) {
    if (data.group[row] !== group) lines[count++] = -1 - (group = data.group[row]);
    lines[count++] = row;
  }
  return lines.slice(0, count);
}

/** How many of the rows' values fall into each of `bins` equal parts of [low, high], with their mean. */
export function histogram(values, rows, low, high, bins) {
  const counts = new Array(bins).fill(0);
  let [sum, count] = [0, 0];
  for (const row of rows) {
    const value = values[row];
    if (!Number.isFinite(value)) continue;
    counts[Math.min(bins - 1, Math.max(0, Math.floor(((value - low) / (high - low)) * bins)))]++;
    sum += value;
    count++;
  }
  return { counts, mean: sum / count, count };
}

/** The row with the highest finite value of each position, by position; -1 where it has but one rollout. */
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
 * The first positions shown whose targets differ: {example, type, text, value, best}. Of each, the first rollouts, and the one
 * with the highest cosine reward of all its rollouts, which is starred, where that is another.
 */
export function tableF1(data, rows, examples = 6, samples = 4) {
  const chosen = new Map();
  for (const row of rows) {
    if (chosen.size === examples) break;
    const group = data.group[row];
    const target = data.targets.subarray(group * data.width, (group + 1) * data.width).join();
    if (!chosen.has(target)) chosen.set(target, group);
  }
  const own = new Map([...chosen.values()].map((group) => [group, []]));
  for (let row = 0; row < data.rows; row++) own.get(data.group[row])?.push(row);
  const textAt = (ids, i) => visible(textOf(data.strings, ids, i * data.width, data.width));
  return [...own].flatMap(([group, all], index) => {
    all.sort((a, b) => data.sample_index[a] - data.sample_index[b] || a - b);
    const cosine = (row) => data.numbers.cosine[row];
    const finite = all.filter((row) => Number.isFinite(cosine(row)));
    const best = finite.length > 1 ? finite.reduce((top, row) => (cosine(row) > cosine(top) ? row : top)) : -1;
    const target = { example: `Ex. ${index + 1}`, type: "GT", text: textAt(data.targets, group), value: "–", best: false };
    const written = all.map((row, place) => ({ row, place: place + 1 })).filter(({ row, place }) => place <= samples || row === best);
    return [target, ...written.map(({ row, place }) => ({
      example: "",
      type: `P${place}`,
      text: textAt(data.tokens, row),
      value: Number.isFinite(cosine(row)) ? cosine(row).toFixed(3) : "–",
      best: row === best,
    }))];
  });
}

/** The same as a Markdown table; the text of models is escaped. */
export function markdownF1(table) {
  const lines = ["| Example | Type | Text | Cosine reward |", "|---|---|---|---|"];
  for (const { example, type, text, value, best } of table) {
    const marked = best ? `**${value}** ★` : value;
    lines.push(`| ${example} | ${type} | ${text.replace(MARKDOWN_MARKS, "\\$&")} | ${marked} |`);
  }
  return `${lines.join("\n")}\n`;
}
