// Painting of the token map: the visible rows, and the whole document as a profile beside them.

import { prepared } from "./shared.js";
import { BORDER, EMPTY, NEWLINE, SIGN, pieceOf, rowOf } from "./token_layout.js";
import { shareOf } from "./token_colours.js";

export const ROW = 22;
export const PAD = 6;
const BASELINE = 15.5;

/** Where a token stands: { row, x, width } for each row that it takes part of. */
export function rectsOf(layout, token) {
  const rects = [];
  for (let piece = pieceOf(layout, token); piece < layout.tokenPiece[token + 1]; piece++) {
    const row = rowOf(layout, piece);
    const last = rects[rects.length - 1];
    if (last?.row === row) last.width = layout.x[piece] + layout.width[piece] - last.x;
    else rects.push({ row, x: layout.x[piece], width: layout.width[piece] });
  }
  return rects;
}

// -- rows -------------------------------------------------------------------------------------------------------------

/** Paint the rows that are visible at `scene.top`; [first row, row after the last]. */
export function paintRows(canvas, scene) {
  const { layout, width, height, top } = scene;
  const context = prepared(canvas, width, height);
  const first = Math.max(Math.floor((top - PAD) / ROW), 0);
  const stop = Math.min(Math.ceil((top + height - PAD) / ROW), layout.rows);
  context.textBaseline = "alphabetic";
  context.direction = "ltr";
  context.save();
  context.translate(0, PAD - top);
  for (let row = first; row < stop; row++) paintGutter(context, scene, row);
  context.translate(scene.gutter, 0);
  context.font = scene.font;
  for (let row = first; row < stop; row++) {
    for (let piece = layout.rowStart[row]; piece < layout.rowStart[row + 1]; piece++) paintPiece(context, scene, row, piece);
  }
  paintMarks(context, scene, first, stop);
  context.restore();
  return [first, stop];
}

function paintGutter(context, scene, row) {
  const piece = scene.layout.rowStart[row];
  const token = scene.layout.token[piece];
  if (piece > 0 && scene.layout.token[piece - 1] === token) return; // it began in a row above
  context.font = scene.small;
  context.fillStyle = scene.colours.quiet;
  context.textAlign = "right";
  context.fillText(String(token), scene.gutter - 10, row * ROW + BASELINE);
  context.textAlign = "left";
}

function paintPiece(context, scene, row, piece) {
  const { layout, ramp, colours } = scene;
  const [token, kind, x, wide, y] = [layout.token[piece], layout.kind[piece], layout.x[piece], layout.width[piece], row * ROW];
  if (kind === BORDER) return paintBorder(context, scene, x, y, layout.text[piece]);
  const level = scene.levels ? scene.levels[token] : 0;
  if (level) {
    context.fillStyle = ramp.grounds[level];
    context.fillRect(x, y + 2, Math.max(wide - 1, 1), ROW - 4); // a hair of the page's ground between two tokens
  }
  if (kind === EMPTY) {
    context.fillStyle = level ? ramp.inks[level] : colours.quiet;
    context.fillRect(x + 1, y + 6, 1, ROW - 12);
    return;
  }
  const faint = kind === SIGN || kind === NEWLINE;
  context.fillStyle = level ? (faint ? ramp.faints : ramp.inks)[level] : faint ? colours.faint : colours.ink;
  context.fillText(layout.text[piece], x, y + BASELINE);
}

function paintBorder(context, scene, x, y, number) {
  context.fillStyle = scene.colours.accent;
  context.fillRect(x + 3, y, 1.5, ROW);
  context.font = scene.small;
  context.fillText(number, x + 7, y + BASELINE - 1);
  context.font = scene.font;
}

function paintMarks(context, scene, first, stop) {
  const { layout, colours } = scene;
  if (first >= stop) return;
  const from = layout.token[layout.rowStart[first]];
  const to = layout.token[layout.rowStart[stop] - 1];
  const visible = (token) => token >= from && token <= to;
  for (let i = 0; i < scene.hits.length && scene.hits[i][0] <= to; i++) {
    for (let token = Math.max(scene.hits[i][0], from); token <= Math.min(scene.hits[i][1], to); token++) {
      underline(context, layout, token, i === scene.hit ? colours.mark : colours.accent, i === scene.hit ? 4 : 2);
    }
  }
  if (scene.range) {
    for (let token = Math.max(scene.range[0], from); token <= Math.min(scene.range[1], to); token++) banded(context, layout, token, colours.accent);
  }
  for (const [token] of scene.targets) {
    if (!visible(token)) continue;
    framed(context, layout, token, colours.mark, 1.5, colours.ground);
    const [{ row, x }] = rectsOf(layout, token);
    Object.assign(context, { fillStyle: colours.mark, strokeStyle: colours.ground, lineWidth: 1 });
    diamond(context, x, row * ROW + 2, 4);
    context.stroke();
  }
  if (visible(scene.selected)) framed(context, layout, scene.selected, colours.accent, 3, colours.ground);
  if (scene.focused && visible(scene.cursor)) framed(context, layout, scene.cursor, colours.ink, 1.5, colours.ground, [4, 3]);
}

function underline(context, layout, token, colour, thick) {
  context.fillStyle = colour;
  for (const { row, x, width } of rectsOf(layout, token)) context.fillRect(x, (row + 1) * ROW - 1 - thick, width, thick);
}

function banded(context, layout, token, colour) {
  context.fillStyle = colour;
  for (const { row, x, width } of rectsOf(layout, token)) {
    context.fillRect(x, row * ROW, width, 2);
    context.fillRect(x, (row + 1) * ROW - 2, width, 2);
  }
}

function framed(context, layout, token, colour, thick, halo = null, dash = []) {
  for (const { row, x, width } of rectsOf(layout, token)) {
    const box = [x - 1.5, row * ROW + 1.5, Math.max(width + 2, 5), ROW - 3];
    if (halo) {
      context.strokeStyle = halo; // the frame is seen on every ground
      context.lineWidth = thick + 2.5;
      context.strokeRect(...box);
    }
    context.strokeStyle = colour;
    context.lineWidth = thick;
    context.setLineDash(dash);
    context.strokeRect(...box);
    context.setLineDash([]);
  }
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
 * Mean and extreme share of the metric's scale in each of `bins` equal strips of the rows: { mean, most }, NaN where no token
 * has a value. The extreme of a diverging metric is the one farthest from its middle.
 */
export function profileOf(metric, rowsOfTokens, rows, bins) {
  const sum = new Float64Array(bins);
  const count = new Uint32Array(bins);
  const most = new Float32Array(bins).fill(NaN);
  const size = metric.diverging ? (share) => Math.abs(share - 0.5) : (share) => share;
  for (let token = 0; token < rowsOfTokens.length; token++) {
    const share = shareOf(metric, metric.values[token]);
    if (share !== share) continue;
    const bin = Math.floor((rowsOfTokens[token] * bins) / rows);
    sum[bin] += share;
    count[bin]++;
    if (!(size(share) <= size(most[bin]))) most[bin] = share;
  }
  return { mean: Float32Array.from(sum, (value, bin) => value / count[bin]), most };
}

/** Height that the whole document takes in a minimap of `height`. */
export function mapHeight(rows, height) {
  return Math.min(height, rows * 3);
}

export function paintMinimap(canvas, scene, width, height) {
  const { layout, colours } = scene;
  const context = prepared(canvas, width, height);
  const tall = mapHeight(layout.rows, height);
  if (scene.profile) paintProfile(context, scene, width, tall);
  const yOf = (token) => (scene.tokenRow[token] / Math.max(layout.rows, 1)) * tall;
  context.fillStyle = colours.accent;
  for (const token of scene.borders.keys()) context.fillRect(0, yOf(token), 9, 1);
  for (const [first] of scene.hits) context.fillRect(width - 4, yOf(first), 4, 2);
  context.fillStyle = colours.mark;
  for (const [token] of scene.targets) diamond(context, 5, yOf(token) + 1, 3);
  const whole = Math.max(layout.rows * ROW + 2 * PAD, 1);
  const [y, share] = [(scene.top / whole) * tall, Math.min(scene.height / whole, 1)];
  context.globalAlpha = 0.14;
  context.fillStyle = colours.ink;
  context.fillRect(0, y, width, Math.max(share * tall, 6));
  context.globalAlpha = 1;
  context.strokeStyle = colours.quiet;
  context.lineWidth = 1;
  context.strokeRect(0.5, y + 0.5, width - 1, Math.max(share * tall, 6) - 1);
  if (scene.selected >= 0) {
    context.fillStyle = colours.accent;
    context.fillRect(0, yOf(scene.selected) - 1, width, 3);
  }
}

function paintProfile(context, scene, width, tall) {
  const { mean, most } = scene.profile;
  const { diverging } = scene.metric;
  const step = tall / mean.length;
  const room = width - 18;
  const long = (share) => Math.max((diverging ? Math.abs(share - 0.5) * 2 : share) * room, 1);
  for (let bin = 0; bin < mean.length; bin++) {
    if (mean[bin] !== mean[bin]) continue;
    const thick = Math.max(step > 2 ? step - 0.5 : step, 1);
    context.fillStyle = scene.ramp.profile[1 + Math.round(mean[bin] * 254)];
    context.fillRect(12, bin * step, long(mean[bin]), thick);
    context.fillStyle = scene.ramp.profile[1 + Math.round(most[bin] * 254)];
    context.fillRect(12 + long(most[bin]) - 2, bin * step, 2, thick);
  }
}
