// The coloured document as a picture: the legend of its colours above its rows, also those outside the view.

import { saveFile } from "./download.js";
import { format, html } from "./shared.js";
import { shareOf } from "./token_colours.js";
import { PAD, ROW, paintSomeRows } from "./token_paint.js";
import { scaleLabels } from "./token_panel.js";

const MOST_SIDE = 16_000; // pixels of a canvas; browsers draw no larger one
const HEAD = 74; // height of the legend
const STRIP = { x: 24, y: 28, width: 260, height: 12 };

/** Which rows fit into a picture, from `from` on unless all fit, and its resolution: { first, stop, scale }. */
export function rowsInPicture(rows, from) {
  const fit = (scale) => Math.floor((MOST_SIDE / scale - HEAD - 2 * PAD) / ROW);
  if (rows <= fit(1)) return { first: 0, stop: rows, scale: rows <= fit(2) ? 2 : 1 };
  const first = Math.min(from, rows - fit(1));
  return { first, stop: first + fit(1), scale: 1 };
}

/** Writes texts one after the other, each [text, font, colour]. Returns where the last one ends. */
function writeAll(context, x, y, texts) {
  for (const [text, font, colour] of texts) {
    Object.assign(context, { font, fillStyle: colour });
    context.fillText(text, x, y);
    x += context.measureText(text).width + 8;
  }
  return x;
}

function paintHead(context, view, part) {
  const { doc, metric, ramp, colours, layout } = view;
  const family = getComputedStyle(view.ui.root).fontFamily;
  const [plain, bold] = [`13px ${family}`, `600 13px ${family}`];
  const titles = metric ? [[metric.title, bold, colours.ink], [metric.unit, plain, colours.quiet]] : [];
  const whole = part.stop - part.first === layout.rows;
  const ends = [layout.token[layout.rowStart[part.first]], layout.token[layout.rowStart[part.stop] - 1]];
  const tokens = whole ? `${format(doc.total)} tokens` : `tokens ${format(ends[0])} to ${format(ends[1])} of ${format(doc.total)}`;
  writeAll(context, 12, 18, [...titles, [tokens, plain, colours.quiet]]);
  const keys = [];
  if (doc.targets.length) keys.push([`◆ ${doc.mark}`, plain, colours.mark]);
  if (doc.chunk_borders.length) keys.push(["│1 chunk", plain, colours.accent]);
  writeAll(context, metric ? STRIP.x + STRIP.width + 36 : 12, 40, keys);
  if (!metric) return;
  const { x, y, width, height } = STRIP;
  for (let i = 0; i < width; i++) {
    context.fillStyle = ramp.grounds[1 + Math.round((i / (width - 1)) * 254)];
    context.fillRect(x + i, y, 1, height);
  }
  Object.assign(context, { font: `11px ${family}`, fillStyle: colours.quiet, textAlign: "center" });
  for (const [value, text] of scaleLabels(metric)) {
    const at = x + shareOf(metric, value) * width;
    context.fillRect(at - 0.5, y + height, 1, 4);
    context.fillText(text, at, y + height + 17);
  }
  context.textAlign = "left";
}

/** A canvas with the document as it is shown now; `from` is the first row of a document that is too long for one picture. */
export function pictureOf(view, from) {
  const part = rowsInPicture(view.layout.rows, from);
  const height = HEAD + (part.stop - part.first) * ROW + 2 * PAD;
  const canvas = html("canvas", { width: Math.round(view.width * part.scale), height: Math.round(height * part.scale) });
  const context = canvas.getContext("2d");
  context.scale(part.scale, part.scale);
  context.fillStyle = view.colours.ground;
  context.fillRect(0, 0, view.width, height);
  paintHead(context, view, part);
  context.translate(0, HEAD + PAD - part.first * ROW);
  const { targetLabels: targets, borders } = view.doc;
  paintSomeRows(context, { ...view, targets, borders, focused: false }, part.first, part.stop);
  return canvas;
}

/** Saves the picture as a PNG that is named after the metric. */
export async function savePicture(view, from) {
  const name = (view.metric?.name ?? "").replace(/[^\w-]+/g, "_");
  const blob = await new Promise((done) => pictureOf(view, from).toBlob(done, "image/png"));
  saveFile(blob, `document${name && `-${name}`}.png`);
}
