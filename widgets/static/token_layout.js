// Positions of tokens on the page: tokens are cut into pieces (runs of text, signs for invisible characters), and pieces fill
// rows. Nothing here touches the page; a function gives the widths.

import { lastAtMost, typed } from "./shared.js";

export const TEXT = 0;
export const SIGN = 1; // drawn faintly: a tab, a control character
export const NEWLINE = 2; // drawn faintly, and the row ends
export const EMPTY = 3; // a token without text: a thin mark
export const BORDER = 4; // the line and number of a chunk, before its first token

const LONG = 512; // units; text that is longer is laid out bit by bit
const PLAIN = /^[\x20-\x7e]+$/;
const PICTURE = "\\p{Extended_Pictographic}[\\ufe0f\\u{1f3fb}-\\u{1f3ff}]*";
const UNSEEN =
  "[\\p{Cc}\\p{Cf}\\p{Cs}\\p{Zl}\\p{Zp}\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180d\\u3164\\uffa0\\ufe00-\\ufe0f\\u{e0100}-\\u{e01ef}]";
const SPECIAL = new RegExp(
  `(?<keep>${PICTURE}(?:[\\u{e0020}-\\u{e007f}]+|(?:\\u200d${PICTURE})*)|[0-9#*]\\ufe0f\\u20e3)|(?<sign>\\r?\\n|${UNSEEN})`,
  "gu",
);
const STARTS_COMBINED = /^\p{M}/u;
const HANGS_ON = /^[\p{M}\u200d\ufe0f\u{1f3fb}-\u{1f3ff}]/u;
const C0 = "NUL SOH STX ETX EOT ENQ ACK BEL BS TAB LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US".split(" ");
const NAMES = {
  ...C0,
  ...{ 0x7f: "DEL", 0xad: "SHY", 0x200b: "ZWSP", 0x200c: "ZWNJ", 0x200d: "ZWJ", 0x200e: "LRM", 0x200f: "RLM" },
  ...{ 0x2028: "LS", 0x2029: "PS", 0x202a: "LRE", 0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO" },
  ...{ 0x2060: "WJ", 0x2066: "LRI", 0x2067: "RLI", 0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM" },
};

// -- text -------------------------------------------------------------------------------------------------------------

/** A string from UTF-16 units, which may include lone surrogates. */
export function textOf(view) {
  const units = typed(view, Uint16Array);
  let text = "";
  for (let at = 0; at < units.length; at += 8192) text += String.fromCharCode(...units.subarray(at, at + 8192));
  return text;
}

/** A sign for an invisible character. */
export function signOf(character) {
  if (character.endsWith("\n")) return character.length > 1 ? "‹CR›↵" : "↵";
  if (character === "\t") return "⇥";
  const code = character.codePointAt(0);
  return `‹${NAMES[code] ?? code.toString(16).toUpperCase().padStart(2, "0")}›`;
}

/** A token's text as it is drawn, cut into { text, kind }. Emoji that are joined inside the token stay joined. */
export function partsOf(text) {
  if (text === "") return [{ text: "", kind: EMPTY }];
  if (PLAIN.test(text)) return [{ text, kind: TEXT }];
  const parts = [];
  let from = 0;
  const run = (to) => {
    if (to > from) parts.push({ text: (STARTS_COMBINED.test(text.slice(from, from + 2)) ? "◌" : "") + text.slice(from, to), kind: TEXT });
  };
  for (const { index, groups } of text.matchAll(SPECIAL)) {
    const { sign } = groups;
    if (sign === undefined) continue;
    run(index);
    parts.push({ text: signOf(sign), kind: sign.endsWith("\n") ? NEWLINE : SIGN });
    from = index + sign.length;
  }
  run(text.length);
  return parts;
}

/** A token in one line, for a tooltip or a screen reader. */
export function visibleText(text, most = 80) {
  const drawn = partsOf(text.slice(0, most)).map((part) => part.text).join("");
  return text.length > most ? `${drawn}…` : drawn;
}

// -- rows -------------------------------------------------------------------------------------------------------------

/**
 * The number of units of `text` from `from` on that fit into `room`, at most `LONG`; at least one character if `force`,
 * never half of one. A very long text is measured in parts.
 */
function fitting(text, from, room, measure, force) {
  const end = Math.min(text.length, from + LONG);
  const wide = measure(text.slice(from, end));
  const average = wide / (end - from) || 1;
  let to = wide <= room ? end : Math.min(end, from + Math.floor(room / average));
  for (;;) {
    while (to > from && to < text.length && ((text.charCodeAt(to) & 0xfc00) === 0xdc00 || HANGS_ON.test(text.slice(to, to + 2)))) to--;
    if (to <= from || measure(text.slice(from, to)) <= room) break;
    to = from + Math.floor((to - from) * 0.9);
  }
  if (to > from || !force) return Math.max(to - from, 0);
  const first = text.codePointAt(from) > 0xffff ? 2 : 1;
  return Math.max(first, Math.min(Math.floor(room / average), 64, text.length - from)); // marks without end on one letter
}

/**
 * Pieces in rows of `width` pixels. `tokens`: { text, starts [T + 1] }. `measure`: text and kind -> pixels. `borders`: token ->
 * number of the chunk that begins there. Rows break before or after white space, and in a word only if it fills the row.
 */
export function layoutTokens(tokens, width, measure, borders = new Map()) {
  const { text, starts } = tokens;
  const total = starts.length - 1;
  const made = { token: [], text: [], x: [], width: [], kind: [], rowStart: [0], tokenPiece: new Uint32Array(total + 1) };
  const known = new Map();
  let x = 0;
  let breakAt = -1; // the piece before which the row may be broken
  let spaced = false; // the last piece was white space

  const endRow = () => {
    made.rowStart.push(made.token.length);
    x = 0;
    breakAt = -1;
  };
  const put = (token, drawn, kind, wide) => {
    made.token.push(token);
    made.text.push(drawn);
    made.x.push(x);
    made.width.push(wide);
    made.kind.push(kind);
    x += wide;
  };
  const breakRow = () => {
    const within = breakAt > made.rowStart.at(-1) && breakAt < made.token.length;
    if (!within || made.x[breakAt] < width * 0.4) return endRow();
    const shift = made.x[breakAt];
    for (let piece = breakAt; piece < made.x.length; piece++) made.x[piece] -= shift;
    made.rowStart.push(breakAt);
    x -= shift;
    breakAt = -1;
  };
  const putLong = (token, part) => {
    for (let from = 0; from < part.text.length; ) {
      const count = fitting(part.text, from, width - x, (some) => measure(some, TEXT), x === 0);
      const piece = part.text.slice(from, (from += count));
      if (count) put(token, piece, TEXT, measure(piece, TEXT));
      if (count < LONG && from < part.text.length) endRow();
    }
  };
  const place = (token, part) => {
    if (spaced || part.kind === BORDER || part.text.startsWith(" ")) breakAt = made.token.length;
    spaced = part.kind !== BORDER && (part.text.endsWith(" ") || part.kind === SIGN);
    if (part.kind === TEXT && part.width > width) return putLong(token, part);
    if (x > 0 && x + part.width > width && part.kind !== NEWLINE && part.kind !== EMPTY) {
      breakRow();
      if (x > 0 && x + part.width > width) endRow();
    }
    put(token, part.text, part.kind, part.width);
    if (part.kind === NEWLINE) endRow();
  };

  for (let token = 0; token < total; token++) {
    made.tokenPiece[token] = made.token.length;
    if (borders.has(token)) {
      const number = String(borders.get(token));
      place(token, { text: number, kind: BORDER, width: measure(number, BORDER) });
    }
    const raw = text.slice(starts[token], starts[token + 1]);
    if (!known.has(raw)) {
      const wide = (part) => (part.text.length > LONG ? Infinity : measure(part.text, part.kind));
      known.set(raw, partsOf(raw).map((part) => ({ ...part, width: wide(part) })));
    }
    for (const part of known.get(raw)) place(token, part);
  }
  made.tokenPiece[total] = made.token.length;
  if (made.rowStart.at(-1) < made.token.length) made.rowStart.push(made.token.length);
  return { ...made, rows: made.rowStart.length - 1, tokens: total };
}

// -- places -----------------------------------------------------------------------------------------------------------

/** Row of a piece. */
export const rowOf = (layout, piece) => lastAtMost(layout.rowStart, piece, layout.rows);

/** First piece of a token, after its border. */
export const pieceOf = ({ tokenPiece, kind }, token) => tokenPiece[token] + (kind[tokenPiece[token]] === BORDER ? 1 : 0);

/** The token at `x` in a row, or the nearest one in it; -1 without such a row. `exact`: -1 beside the text too. */
export function tokenAt(layout, row, x, exact = false) {
  if (row < 0 || row >= layout.rows) return -1;
  const [first, stop] = [layout.rowStart[row], layout.rowStart[row + 1]];
  if (exact && (x < 0 || x > layout.x[stop - 1] + layout.width[stop - 1] + 2)) return -1;
  for (let piece = first; piece < stop; piece++) {
    if (x < layout.x[piece] + layout.width[piece]) return layout.token[piece];
  }
  return layout.token[stop - 1];
}
