// What a model held likely in place of a token: read from arrays that came with the document, or asked for one by one.

import { counts, floats } from "./shared.js";
import { textOf } from "./token_layout.js";

const PAUSE = 40; // milliseconds on a token before Python is asked

/** Rows of [text, probability] from packed arrays, one for each of `total` tokens. */
export function unpackRows(packed, total) {
  const [index, probabilities] = [counts(packed.index), floats(packed.probabilities)];
  const [text, starts] = [textOf(packed.text), counts(packed.offsets)];
  return (token) => {
    const rows = [];
    for (let at = token * packed.width; token < total && at < (token + 1) * packed.width; at++) {
      if (probabilities[at] === probabilities[at]) rows.push([text.slice(starts[index[at]], starts[index[at] + 1]), probabilities[at]]);
    }
    return rows;
  };
}

/** The alternatives of one document. `onAnswer`: called with a token when an answer for it came. */
export class Answers {
  constructor(model, doc, onAnswer) {
    const { alternatives } = doc;
    Object.assign(this, { model, key: doc.key, onAnswer, known: new Map(), asked: new Set(), timer: 0 });
    this.lazy = Boolean(alternatives?.lazy) && !model.alone;
    this.rows = alternatives && !alternatives.lazy ? unpackRows(alternatives, doc.total) : null;
  }

  /** Rows of a token; null while they are awaited, undefined where nobody has any. */
  of(token) {
    if (this.rows) return this.rows(token);
    if (this.known.has(token) || !this.lazy) return this.known.get(token);
    clearTimeout(this.timer);
    if (!this.asked.has(token)) this.timer = setTimeout(() => this.ask(token), PAUSE);
    return null;
  }

  ask(token) {
    this.asked.add(token);
    this.model.send({ ask: [token], document: this.key });
  }

  /** A message from Python; those to other documents are dropped. */
  receive(content, buffers) {
    const answer = content?.alternatives;
    if (!answer || answer.document !== this.key) return;
    const packed = { width: answer.width };
    answer.names.forEach((name, i) => Object.assign(packed, { [name]: buffers[i] }));
    const rows = unpackRows(packed, answer.tokens.length);
    answer.tokens.forEach((token, i) => this.known.set(token, rows(i)));
    answer.tokens.forEach((token) => this.onAnswer(token));
  }

  stop() {
    clearTimeout(this.timer);
  }
}
