// The colour, dash and symbol of a series, as its curves, its legend and its row in the run table show them.

import { svg } from "./shared.js";

/** Dashes of lines, in px; lines of the same colour differ in them. */
export const DASHES = { solid: "", dash: "7 4", dot: "2 3", dashdot: "8 3 2 3" };

const SYMBOLS = {
  circle: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z",
  diamond: "M0 -4.6L4.6 0L0 4.6L-4.6 0Z",
  square: "M-3.4 -3.4H3.4V3.4H-3.4Z",
  "triangle-up": "M0 -4.4L4.2 3.2H-4.2Z",
  x: "M-3.6 -1.8L-1.8 -3.6L0 -1.8L1.8 -3.6L3.6 -1.8L1.8 0L3.6 1.8L1.8 3.6L0 1.8L-1.8 3.6L-3.6 1.8L-1.8 0Z",
};

/** The colour with the number that Python sends as `look`. */
export const colourOf = (look) => `var(--series-${look % 6})`;

/** A line in the dashes of its method, and the method's symbol. */
export const stroke = (parent, method, d) => {
  const looks = { "stroke-dasharray": DASHES[method.dash] ?? "", style: method.width ? `--wide: ${method.width}` : "" };
  return svg("path", { class: "line", d, ...looks }, parent);
};
export const symbol = (parent, { dash, symbol }, more = {}) =>
  svg("path", { class: DASHES[dash] ? "mark hollow" : "mark", d: SYMBOLS[symbol], ...more }, parent);

/** A short piece of a method's line with its symbol. */
export function glyph(parent, method) {
  const style = `color: ${method.colour}`;
  const drawing = svg("svg", { class: "glyph", viewBox: "-14 -6 28 12", style, "aria-hidden": true }, parent);
  stroke(drawing, method, "M-14 0H14");
  symbol(drawing, method);
}
