// Finding and copying: places in the text, and which tokens they touch.

import { lastAtMost } from "./shared.js";

export const MOST_HITS = 10000;

/** [start, end) of every place where `query` stands, upper and lower case alike. */
export function findAll(text, query, most = MOST_HITS) {
  if (!query) return [];
  const pattern = new RegExp(query.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu");
  const hits = [];
  for (const found of text.matchAll(pattern)) {
    hits.push([found.index, found.index + found[0].length]);
    if (hits.length >= most) break;
  }
  return hits;
}

/** The last token that begins at or before a place of the text; of empty ones before it none. */
export function tokenOfPlace(starts, place) {
  return lastAtMost(starts, place, starts.length - 1);
}

/** First and last token of each hit. */
export function hitTokens(starts, hits) {
  return hits.map(([start, end]) => [tokenOfPlace(starts, start), tokenOfPlace(starts, end - 1)]);
}

/** Text of the tokens from one to another, or of the whole line that a token stands in. */
export function textOfRange(tokens, first, last) {
  return tokens.text.slice(tokens.starts[first], tokens.starts[last + 1]);
}

export function lineOf(tokens, token) {
  const { text, starts } = tokens;
  const place = Math.min(starts[token], text.length - 1);
  const begin = place > 0 ? text.lastIndexOf("\n", place - 1) + 1 : 0;
  const end = text.indexOf("\n", place);
  return text.slice(begin, end < 0 ? text.length : end);
}
