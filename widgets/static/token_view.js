// The state of one token map on the page, and the functions that change it: layout, colours, drawing, cursor, search.

import { clamp, copyText, counts, floats, format, html, put, quantity } from "./shared.js";
import { BORDER, EMPTY, NEWLINE, SIGN, layoutTokens, pieceOf, rowOf, textOf, tokenAt, visibleText } from "./token_layout.js";
import { faintOn, highestTokens, isDark, levelsOf, rampOf } from "./token_colours.js";
import { MOST_HITS, findAll, hitTokens, lineOf, textOfRange } from "./token_search.js";
import { PAD, ROW, mapHeight, paintMinimap, paintRows, profileOf, rectsOf, tokenRows } from "./token_paint.js";
import { drawLegend, fillTip, hideTip, placeTip, withUnit } from "./token_panel.js";

export const MINIMAP = 76;
const NO_DOCUMENT = { key: -1, text_key: -1, metrics: [], targets: [], chunk_borders: [], alternatives: null, mark: "sampled position" };

// -- data -------------------------------------------------------------------------------------------------------------

export function unpackDocument(raw) {
  const document = { ...NO_DOCUMENT, ...raw };
  const tokens = { text: raw.text ? textOf(raw.text) : "", starts: counts(raw.offsets) ?? new Uint32Array(1) };
  return {
    ...document,
    tokens,
    total: tokens.starts.length - 1,
    metrics: document.metrics.map((metric) => ({ ...metric, values: floats(metric.values) })),
    targetLabels: new Map(document.targets),
    borders: new Map(document.chunk_borders.map((token, index) => [token, index + 1])),
  };
}

/** Colours of the theme as #rrggbb, as they appear on its ground. */
function coloursOf(root, canvas) {
  const style = getComputedStyle(root);
  const context = html("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const colour = (name, ...below) => {
    for (const layer of [...below, style.getPropertyValue(name).trim() || "#808080"]) {
      context.fillStyle = layer;
      context.fillRect(0, 0, 1, 1);
    }
    const bytes = [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    return `#${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  };
  const ground = colour("--ground");
  const [ink, quiet, accent, mark] = ["--ink", "--quiet", "--accent", "--series-2"].map((name) => colour(name, ground));
  return { ground, ink, quiet, accent, mark, faint: faintOn(ground, ink), dark: isDark(ground), font: getComputedStyle(canvas).font };
}

/** Widths of text in the canvas's font; plain text in a monospaced font is counted, not measured. */
function measurer(canvas, font, small) {
  const context = canvas.getContext("2d");
  context.font = font;
  const cell = context.measureText("MMMMMMMMMM").width / 10;
  const monospaced = Math.abs(context.measureText("iiiiiiiiii").width / 10 - cell) < 0.01;
  return (text, kind) => {
    if (kind === EMPTY) return 4;
    if (kind === BORDER) {
      context.font = small;
      const wide = context.measureText(text).width + 12;
      context.font = font;
      return wide;
    }
    if (kind === SIGN && text === "⇥") return 4 * cell;
    if (kind === NEWLINE) return Math.ceil(context.measureText(text).width) + 5; // its sign is wider than the font says
    return monospaced && /^[\x20-\x7e]*$/.test(text) ? text.length * cell : context.measureText(text).width;
  };
}

// -- drawing ----------------------------------------------------------------------------------------------------------

function layOut(view) {
  const { ui, doc } = view;
  view.colours = coloursOf(ui.root, ui.canvas);
  view.small = view.colours.font.replace(/[\d.]+px/, "10.5px");
  const measure = measurer(ui.canvas, view.colours.font, view.small);
  view.gutter = measure(String(Math.max(doc.total - 1, 0)), BORDER) + 8;
  view.width = Math.max(ui.frame.clientWidth - MINIMAP, 120);
  const layout = layoutTokens(doc.tokens, Math.max(view.width - view.gutter - 26, 40), measure, doc.borders);
  const firstBefore = view.layout ? firstVisible(view) : 0;
  const sameText = view.layoutOf === doc.text_key;
  const height = layout.rows * ROW + 2 * PAD;
  const tall = clamp(height, 60, view.model.get("height"));
  Object.assign(view, { layout, tall, tokenRow: tokenRows(layout), layoutOf: doc.text_key });
  ui.tall.style.height = `${height}px`;
  if (!view.resized) ui.frame.style.height = `${view.tall}px`;
  ui.scroller.scrollTop = sameText && doc.total ? view.tokenRow[Math.min(firstBefore, doc.total - 1)] * ROW : 0;
}

function recolour(view) {
  const { doc, ui, model } = view;
  const metric = doc.metrics.find(({ name }) => name === model.get("metric")) ?? doc.metrics[0] ?? null;
  const ramp = rampOf(view.colours.dark, Boolean(metric?.diverging));
  Object.assign(view, { metric, ramp, levels: metric && levelsOf(metric), highest: null, highestAt: -1 });
  ui.metric.value = metric?.name ?? "";
  drawLegend(ui.legend, metric, ramp, doc);
  ui.metric.title = metric?.help ?? "";
  if (view.again && ui.status.textContent === view.announced) announce(view, view.again(), view.again); // with the values and marks of now
  ui.canvas.setAttribute("aria-label", `${format(doc.total)} tokens${metric ? `, coloured by ${metric.title}` : ""}`);
}

export function draw(view) {
  view.frame = 0;
  const { ui, stale } = view;
  if (!view.doc.total) Object.assign(ui.root.dataset, { painted: view.doc.key, first: -1, last: -1, tokens: 0 });
  if (!ui.frame.clientWidth) return; // hidden: the next change of size draws it
  if (stale.layout) layOut(view);
  if (stale.layout || stale.colour) recolour(view);
  const height = ui.frame.clientHeight;
  const bins = Math.max(Math.min(view.layout.rows, Math.floor(mapHeight(view.layout.rows, height))), 1);
  if (stale.layout || stale.colour || view.profile?.mean.length !== bins) {
    view.profile = view.metric && view.doc.total ? profileOf(view.metric, view.tokenRow, view.layout.rows, bins) : null;
  }
  view.stale = {};
  if (view.wanted >= 0) scrollTo(view, view.wanted, view.centred);
  view.wanted = -1;
  const { targets, borders, key, total } = view.doc;
  const scene = { ...view, targets, borders, height: ui.scroller.clientHeight, top: ui.scroller.scrollTop };
  const [from, stop] = paintRows(ui.canvas, scene);
  paintMinimap(ui.minimap, scene, MINIMAP - 8, height);
  const { token, rowStart } = view.layout;
  const [first, last] = stop > from ? [token[rowStart[from]], token[rowStart[stop] - 1]] : [-1, -1];
  Object.assign(ui.root.dataset, { painted: key, first, last, tokens: total });
}

export function schedule(view, what = {}) {
  Object.assign(view.stale, what);
  view.frame ||= requestAnimationFrame(() => draw(view));
}

// -- places -----------------------------------------------------------------------------------------------------------

export function firstVisible(view) {
  const row = Math.max(Math.ceil((view.ui.scroller.scrollTop - PAD - 1) / ROW), 0);
  return view.layout.rows ? view.layout.token[view.layout.rowStart[Math.min(row, view.layout.rows - 1)]] : 0;
}

function scrollTo(view, token, centred) {
  if (token >= view.doc.total) return;
  const { scroller } = view.ui;
  const y = PAD + view.tokenRow[token] * ROW;
  if (centred === "top") scroller.scrollTop = y - PAD;
  else if (y < scroller.scrollTop || y + ROW > scroller.scrollTop + scroller.clientHeight) {
    const off = centred ? scroller.clientHeight / 2 - ROW : y < scroller.scrollTop ? PAD : scroller.clientHeight - ROW - PAD;
    scroller.scrollTop = y - off;
  }
}

export function bring(view, token, centred = false) {
  Object.assign(view, { wanted: token, centred });
  schedule(view);
}

export function tokenUnder(view, event, exact = true) {
  const box = view.ui.canvas.getBoundingClientRect();
  const row = Math.floor((event.clientY - box.top + view.ui.scroller.scrollTop - PAD) / ROW);
  const clamped = exact ? row : clamp(row, 0, view.layout.rows - 1);
  return tokenAt(view.layout, clamped, event.clientX - box.left - view.gutter, exact);
}

// -- messages ---------------------------------------------------------------------------------------------------------

export function describe(view, token) {
  const { doc, metric } = view;
  const text = textOfRange(doc.tokens, token, token);
  const parts = [`token ${format(token)}: “${text === "" ? "part of a character" : visibleText(text, 60)}”`];
  if (metric) parts.push(`${metric.title} ${withUnit(metric, metric.values[token])}`);
  if (doc.targetLabels.has(token)) parts.push(visibleText(doc.targetLabels.get(token)));
  if (doc.borders.has(token)) parts.push(`chunk ${doc.borders.get(token)} begins`);
  return parts.join(" · ");
}

/** Shows a text in the status line; `again` returns it anew when what it describes has changed. */
export function announce(view, text, again = null) {
  view.ui.status.textContent = text;
  Object.assign(view, { announced: view.ui.status.textContent, again });
}

/** Shows a description of a token in the status line, after some words. */
export function announceToken(view, words, token) {
  const text = () => words + describe(view, token);
  announce(view, text(), text);
}

export function showTip(view, token) {
  const { ui, doc } = view;
  view.tipped = token;
  if (token < 0 || !view.layout || token >= doc.total) return hideTip(ui.tip);
  const canvas = ui.canvas.getBoundingClientRect();
  const [{ row, x }] = rectsOf(view.layout, token);
  const top = canvas.top + PAD + row * ROW - ui.scroller.scrollTop;
  if (top < canvas.top - ROW || top > canvas.bottom) return hideTip(ui.tip);
  const text = textOfRange(doc.tokens, token, token);
  const facts = { token, total: doc.total, text, metrics: doc.metrics, chosen: view.metric, target: doc.targetLabels.get(token) };
  fillTip(ui.tip, { ...facts, alternatives: view.answers.of(token) });
  placeTip(ui.tip, { left: canvas.left + view.gutter + x, top, bottom: top + ROW });
}

// -- cursor and selection ---------------------------------------------------------------------------------------------

/** Puts the cursor on a token; `extend` marks the tokens up to it. */
export function moveTo(view, token, { extend = false, centred = false, tip = true } = {}) {
  if (!view.doc.total) return;
  const to = clamp(token, 0, view.doc.total - 1);
  if (extend) {
    view.anchor = view.range ? view.anchor : view.cursor < 0 ? to : view.cursor;
    view.range = [Math.min(view.anchor, to), Math.max(view.anchor, to)];
  } else view.range = null;
  view.cursor = to;
  const many = view.range && view.range[1] - view.range[0] + 1;
  announceToken(view, many ? `${quantity(many, "token")} highlighted, to ` : "", to);
  bring(view, to, centred);
  hideTip(view.ui.tip);
  if (tip) requestAnimationFrame(() => requestAnimationFrame(() => view.cursor === to && view.focused && showTip(view, to)));
}

export function select(view, token) {
  view.selected = token;
  token < 0 ? announce(view, "nothing selected") : announceToken(view, "selected ", token);
  if (token >= 0 && token === view.model.get("selected")) view.model.send?.({ again: true }); // no change to be sent
  put(view.model, "selected", token); // after the announcement: on a page without Python, the list may answer with a status
  schedule(view);
}

export function rowsAway(view, rows) {
  const { layout } = view;
  const piece = rows < 0 ? pieceOf(layout, view.cursor) : layout.tokenPiece[view.cursor + 1] - 1;
  const row = rowOf(layout, piece);
  const x = (view.column ??= layout.x[piece] + layout.width[piece] / 2);
  const to = clamp(row + rows, 0, layout.rows - 1);
  return to === row ? (rows < 0 ? 0 : view.doc.total - 1) : tokenAt(layout, to, x);
}

export function rowEnd(view, last) {
  const { token, rowStart } = view.layout;
  const row = rowOf(view.layout, pieceOf(view.layout, view.cursor));
  return token[last ? rowStart[row + 1] - 1 : rowStart[row]];
}

export function jump(view, by) {
  const tokens = (view.highest ??= highestTokens(view.metric));
  if (!tokens.length) return announce(view, "no values to go to");
  view.highestAt = view.highestAt < 0 ? (by > 0 ? 0 : tokens.length - 1) : (view.highestAt + by + tokens.length) % tokens.length;
  moveTo(view, tokens[view.highestAt], { centred: true });
  announce(view, `highest value ${view.highestAt + 1} of ${tokens.length} · ${describe(view, view.cursor)}`);
}

export function search(view, by) {
  const query = view.ui.find.value;
  if (query !== view.query) {
    const { tokens } = view.doc;
    const hits = hitTokens(tokens.starts, findAll(tokens.text, query));
    const from = view.cursor >= 0 ? view.cursor : view.layout ? firstVisible(view) : 0;
    Object.assign(view, { query, hits, hit: Math.max(hits.findIndex(([first]) => first >= from), 0) });
  } else if (view.hits.length) view.hit = (view.hit + by + view.hits.length) % view.hits.length;
  const { hits, hit } = view;
  const count = `${format(hit + 1)} of ${format(hits.length)}${hits.length >= MOST_HITS ? "+" : ""}`;
  view.ui.count.textContent = query && (hits.length ? count : "none");
  if (hits.length) moveTo(view, hits[hit][0], { centred: true, tip: false });
  if (query) announce(view, hits.length ? `match ${count} · ${describe(view, view.cursor)}` : `“${visibleText(query)}” not found`);
  schedule(view);
}

/** Copies the highlighted text or the line: through a copy event of the keys, else as the button does. */
export function copy(view, { clipboardData }) {
  const { range, doc, ui } = view;
  const token = view.cursor >= 0 ? view.cursor : view.selected;
  const text = range ? textOfRange(doc.tokens, ...range) : token >= 0 ? lineOf(doc.tokens, token) : "";
  announce(view, text ? `copied ${format(text.length)} characters` : "nothing to copy: select a token or highlight text");
  if (clipboardData) clipboardData.setData("text/plain", text);
  else if (text) copyText(text, ui.root).then(() => ui.copy.focus());
  return text;
}
