// Painting of the token map: the visible rows, and the whole document as a profile beside them.

import { prepared } from "./shared.js";
import { BORDER, EMPTY, NEWLINE, SIGN, pieceOf, rowOf } from "./token_layout.js";
import { shareOf } from "./token_colours.js";

export const ROW = 22;
export const PAD = 6;
const BASELINE = 15.5;

/** The parts of a token: { row, x, width } for each row that it is in. */
export function rectsOf(layout, token) {
  const rects = [];
  for (let piece = pieceOf(layout, token); piece < layout.tokenPiece[token + 1]; piece++) {
    const row = rowOf(layout, piece);
    const last = rects.at(-1);
    if (last?.row === row) last.width = layout.x[piece] + layout.width[piece] - last.x;
    else rects.push({ row, x: layout.x[piece], width: layout.width[piece] });
  }
  return rects;
}

function fill(context, colour, ...box) {
  context.fillStyle = colour;
  context.fillRect(...box);
}

// -- rows -------------------------------------------------------------------------------------------------------------

/** Paints the rows that are visible at `scene.top`. Returns the first row and the row after the last. */
export function paintRows(canvas, scene) {
  const { layout, width, height, top } = scene;
  const context = prepared(canvas, width, height);
  const first = Math.max(Math.floor((top - PAD) / ROW), 0);
  const stop = Math.min(Math.ceil((top + height - PAD) / ROW), layout.rows);
  context.translate(0, PAD - top);
  paintSomeRows(context, scene, first, stop);
  return [first, stop];
}

/** Paints the rows from `first` to before `stop`; row 0 is at the origin of the context. */
export function paintSomeRows(context, scene, first, stop) {
  const { layout } = scene;
  Object.assign(context, { textBaseline: "alphabetic", direction: "ltr" });
  for (let row = first; row < stop; row++) paintGutter(context, scene, row);
  context.translate(scene.gutter, 0);
  context.font = scene.colours.font;
  for (let row = first; row < stop; row++) {
    for (let piece = layout.rowStart[row]; piece < layout.rowStart[row + 1]; piece++) paintPiece(context, scene, row, piece);
  }
  if (first < stop) paintMarks(context, scene, layout.token[layout.rowStart[first]], layout.token[layout.rowStart[stop] - 1]);
}

function paintGutter(context, { layout, small, colours, gutter }, row) {
  const piece = layout.rowStart[row];
  const token = layout.token[piece];
  if (piece > 0 && layout.token[piece - 1] === token) return; // it begins in a row above
  Object.assign(context, { font: small, fillStyle: colours.quiet, textAlign: "right" });
  context.fillText(String(token), gutter - 10, row * ROW + BASELINE);
  context.textAlign = "left";
}

function paintPiece(context, scene, row, piece) {
  const { layout, ramp, colours } = scene;
  const [token, kind, x, wide, y] = [layout.token[piece], layout.kind[piece], layout.x[piece], layout.width[piece], row * ROW];
  if (kind === BORDER) return paintBorder(context, scene, x, y, layout.text[piece]);
  const level = scene.levels ? scene.levels[token] : 0;
  if (level) fill(context, ramp.grounds[level], x, y + 2, Math.max(wide - 1, 1), ROW - 4); // a gap between two tokens
  if (kind === EMPTY) return fill(context, level ? ramp.inks[level] : colours.quiet, x + 1, y + 6, 1, ROW - 12);
  const faint = kind === SIGN || kind === NEWLINE;
  context.fillStyle = level ? (faint ? ramp.faints : ramp.inks)[level] : faint ? colours.faint : colours.ink;
  context.fillText(layout.text[piece], x, y + BASELINE);
}

function paintBorder(context, { small, colours }, x, y, number) {
  fill(context, colours.accent, x + 3, y, 1.5, ROW);
  context.font = small;
  context.fillText(number, x + 7, y + BASELINE - 1);
  context.font = colours.font;
}

/** Paints the search hits, the marked range, targets, selection and cursor among the visible tokens `from` to `to`. */
function paintMarks(context, scene, from, to) {
  const { layout, colours } = scene;
  const visible = (token) => token >= from && token <= to;
  const edged = ([first, last], colour, edges) => {
    for (let token = Math.max(first, from); token <= Math.min(last, to); token++) {
      for (const { row, x, width } of rectsOf(layout, token)) {
        for (const [top, thick] of edges) fill(context, colour, x, row * ROW + top, width, thick);
      }
    }
  };
  for (let i = 0; i < scene.hits.length && scene.hits[i][0] <= to; i++) {
    const thick = i === scene.hit ? 4 : 2;
    edged(scene.hits[i], i === scene.hit ? colours.mark : colours.accent, [[ROW - 1 - thick, thick]]);
  }
  if (scene.range) edged(scene.range, colours.accent, [[0, 2], [ROW - 2, 2]]);
  for (const [token] of scene.targets) {
    if (!visible(token)) continue;
    framed(context, scene, token, colours.mark, 1.5);
    const [{ row, x }] = rectsOf(layout, token);
    Object.assign(context, { fillStyle: colours.mark, strokeStyle: colours.ground, lineWidth: 1 });
    diamond(context, x, row * ROW + 1, 3);
    context.stroke();
  }
  if (visible(scene.selected)) framed(context, scene, scene.selected, colours.accent, 3);
  if (scene.focused && visible(scene.cursor)) framed(context, scene, scene.cursor, colours.ink, 1.5, [4, 3]);
}

/** Paints a token's frame with a halo, so that it is visible on every ground; it stays in the gaps between characters. */
function framed(context, { layout, colours }, token, colour, thick, dash = []) {
  const strokes = [[colours.ground, thick + 1, []], [colour, thick, dash]];
  for (const { row, x, width } of rectsOf(layout, token)) {
    for (const [strokeStyle, lineWidth, pattern] of strokes) {
      Object.assign(context, { strokeStyle, lineWidth });
      context.setLineDash(pattern);
      context.strokeRect(x - 0.5, row * ROW + 1.5, Math.max(width, 4), ROW - 3);
    }
  }
  context.setLineDash([]);
}

function diamond(context, x, y, size) {
  context.beginPath();
  for (const [dx, dy] of [[0, -size], [size, 0], [0, size], [-size, 0]]) context.lineTo(x + dx, y + dy);
  context.closePath();
  context.fill();
}

// -- minimap ----------------------------------------------------------------------------------------------------------

/** Row of every token [T]. */
export function tokenRows(layout) {
  const rows = new Uint32Array(layout.tokens);
  for (let row = 0, token = 0; row < layout.rows; row++) {
    for (const last = layout.token[layout.rowStart[row + 1] - 1]; token <= last; token++) rows[token] = row;
  }
  return rows;
}

/**
 * Mean and extreme share of the metric's scale in each of `bins` equal parts of the rows: { mean, most }, NaN without a
 * value. The extreme of a diverging metric is the one farthest from its middle.
 */
export function profileOf(metric, rowsOfTokens, rows, bins) {
  const sum = new Float64Array(bins);
  const count = new Uint32Array(bins);
  const most = new Float32Array(bins).fill(NaN);
  const size = metric.diverging ? (share) => Math.abs(share - 0.5) : (share) => share;
  for (let token = 0; token < rowsOfTokens.length; token++) {
    const share = shareOf(metric, metric.values[token]);
    if (Number.isNaN(share)) continue;
    const bin = Math.floor((rowsOfTokens[token] * bins) / rows);
    sum[bin] += share;
    count[bin]++;
    if (!(size(share) <= size(most[bin]))) most[bin] = share;
  }
  return { mean: Float32Array.from(sum, (value, bin) => value / count[bin]), most };
}

/** Height of the whole document in a minimap of `height`. */
export const mapHeight = (rows, height) => Math.min(height, rows * 3);

export function paintMinimap(canvas, scene, width, height) {
  const { layout, colours } = scene;
  const context = prepared(canvas, width, height);
  const tall = mapHeight(layout.rows, height);
  if (scene.profile) paintProfile(context, scene, width, tall);
  const yOf = (token) => (scene.tokenRow[token] / Math.max(layout.rows, 1)) * tall;
  for (const token of scene.borders.keys()) fill(context, colours.accent, 0, yOf(token), 9, 1);
  for (const [first] of scene.hits) fill(context, colours.accent, width - 4, yOf(first), 4, 2);
  context.fillStyle = colours.mark;
  for (const [token] of scene.targets) diamond(context, 5, yOf(token) + 1, 3);
  const total = layout.rows * ROW + 2 * PAD;
  const [y, high] = [(scene.top / total) * tall, Math.max(Math.min(scene.height / total, 1) * tall, 6)];
  context.globalAlpha = 0.14;
  fill(context, colours.ink, 0, y, width, high);
  Object.assign(context, { globalAlpha: 1, strokeStyle: colours.quiet, lineWidth: 1 });
  context.strokeRect(0.5, y + 0.5, width - 1, high - 1);
  if (scene.selected >= 0) fill(context, colours.accent, 0, yOf(scene.selected) - 1, width, 3);
}

function paintProfile(context, { profile, metric, ramp }, width, tall) {
  const step = tall / profile.mean.length;
  const thick = Math.max(step > 2 ? step - 0.5 : step, 1);
  const room = width - 18;
  const long = (share) => Math.max((metric.diverging ? Math.abs(share - 0.5) * 2 : share) * room, 1);
  profile.mean.forEach((mean, bin) => {
    if (Number.isNaN(mean)) return;
    const [y, most] = [bin * step, profile.most[bin]];
    fill(context, ramp.profile[1 + Math.round(mean * 254)], 12, y, long(mean), thick);
    fill(context, ramp.profile[1 + Math.round(most * 254)], 12 + long(most) - 2, y, 2, thick);
  });
}
