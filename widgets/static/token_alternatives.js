// The most likely tokens in place of a token: read from arrays of the document, or requested from Python one by one.

import { counts, floats } from "./shared.js";
import { textOf } from "./token_layout.js";

const PAUSE = 40; // milliseconds on a token before the request

/** A function from each of `total` tokens to its rows of [text, probability], from packed arrays. */
export function unpackRows(packed, total) {
  const [index, probabilities] = [counts(packed.index), floats(packed.probabilities)];
  const [text, starts] = [textOf(packed.text), counts(packed.offsets)];
  return (token) => {
    const rows = [];
    for (let at = token * packed.width; token < total && at < (token + 1) * packed.width; at++) {
      if (!Number.isNaN(probabilities[at])) rows.push([text.slice(starts[index[at]], starts[index[at] + 1]), probabilities[at]]);
    }
    return rows;
  };
}

/** The alternatives of one document. `onAnswer`: called with a token when the answer for it has come. */
export class Answers {
  constructor(model, doc, onAnswer) {
    const { key, total, alternatives } = doc;
    Object.assign(this, { model, key, onAnswer, known: new Map(), asked: new Set(), timer: 0 });
    this.lazy = alternatives?.lazy && !model.alone;
    this.rows = alternatives && !alternatives.lazy ? unpackRows(alternatives, total) : null;
  }

  /** Rows of a token; null until the answer has come, undefined if there are none. */
  of(token) {
    if (this.rows) return this.rows(token);
    if (this.known.has(token) || !this.lazy) return this.known.get(token);
    clearTimeout(this.timer);
    if (this.asked.has(token)) return null;
    this.timer = setTimeout(() => {
      this.asked.add(token);
      this.model.send({ ask: [token], document: this.key });
    }, PAUSE);
    return null;
  }

  /** Takes a message from Python; messages about other documents are dropped. */
  receive(content, buffers) {
    const answer = content?.alternatives;
    if (!answer || answer.document !== this.key) return;
    const packed = Object.fromEntries(answer.names.map((name, i) => [name, buffers[i]]));
    const rows = unpackRows({ ...packed, width: answer.width }, answer.tokens.length);
    answer.tokens.forEach((token, i) => this.known.set(token, rows(i)));
    answer.tokens.forEach(this.onAnswer);
  }

  stop() {
    clearTimeout(this.timer);
  }
}
