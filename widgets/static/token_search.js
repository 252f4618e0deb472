// Search and copying: places in the text, and the tokens at them.

import { lastAtMost } from "./shared.js";

export const MOST_HITS = 10000;

/** [start, end) of every occurrence of `query`, in upper or lower case. */
export function findAll(text, query, most = MOST_HITS) {
  if (!query) return [];
  const pattern = new RegExp(query.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu");
  const hits = [];
  for (const { index, 0: found } of text.matchAll(pattern)) {
    if (hits.push([index, index + found.length]) >= most) break;
  }
  return hits;
}

/** First and last token of each hit. */
export function hitTokens(starts, hits) {
  const tokenAt = (place) => lastAtMost(starts, place, starts.length - 1);
  return hits.map(([start, end]) => [tokenAt(start), tokenAt(end - 1)]);
}

/** Text of the tokens from `first` to `last`. */
export const textOfRange = ({ text, starts }, first, last) => text.slice(starts[first], starts[last + 1]);

/** The line that contains a token. */
export function lineOf({ text, starts }, token) {
  const place = Math.min(starts[token], text.length - 1);
  const begin = place > 0 ? text.lastIndexOf("\n", place - 1) + 1 : 0;
  const end = text.indexOf("\n", place);
  return text.slice(begin, end < 0 ? text.length : end);
}
