// The state of one token map on the page and what changes it: laying out, colouring, drawing, moving, searching.

import { clamp, copyText, counts, floats, format, put } from "./shared.js";
import { BORDER, EMPTY, SIGN, layoutTokens, pieceOf, rowOf, textOf, tokenAt, visibleText } from "./token_layout.js";
import { faintOn, highestTokens, isDark, levelsOf, rampOf } from "./token_colours.js";
import { MOST_HITS, findAll, hitTokens, lineOf, textOfRange } from "./token_search.js";
import { PAD, ROW, mapHeight, paintMinimap, paintRows, profileOf, rectsOf, tokenRows } from "./token_paint.js";
import { drawLegend, fillTip, hideTip, placeTip, withUnit } from "./token_panel.js";

export const MINIMAP = 76;
const NO_DOCUMENT = { key: -1, text_key: -1, metrics: [], targets: [], chunk_borders: [], alternatives: null };

// -- data -------------------------------------------------------------------------------------------------------------

export function unpackDocument(raw) {
  const document = { ...NO_DOCUMENT, ...raw };
  const tokens = { text: raw.text ? textOf(raw.text) : "", starts: raw.offsets ? counts(raw.offsets) : new Uint32Array(1) };
  return {
    ...document,
    tokens,
    total: tokens.starts.length - 1,
    metrics: document.metrics.map((metric) => ({ ...metric, values: floats(metric.values) })),
    targetLabels: new Map(document.targets),
    borders: new Map(document.chunk_borders.map((token, index) => [token, index + 1])),
  };
}

/** Colours of the theme as #rrggbb, as they look on its ground. */
function coloursOf(root, canvas) {
  const style = getComputedStyle(root);
  const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  const seen = (name) => {
    context.fillStyle = style.getPropertyValue(name).trim() || "#808080";
    context.fillRect(0, 0, 1, 1);
    return `#${[...context.getImageData(0, 0, 1, 1).data.slice(0, 3)].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  };
  const over = (ground, name) => {
    context.fillStyle = ground;
    context.fillRect(0, 0, 1, 1);
    return seen(name);
  };
  const ground = seen("--ground");
  const [ink, quiet, accent, mark] = ["--ink", "--quiet", "--accent", "--series-2"].map((name) => over(ground, name));
  return { ground, ink, quiet, accent, mark, faint: faintOn(ground, ink), dark: isDark(ground), font: getComputedStyle(canvas).font };
}

/** Widths of text in the canvas's font; those of plain text in an even font are counted. */
function measurer(canvas, font, small) {
  const context = canvas.getContext("2d");
  context.font = font;
  const cell = context.measureText("MMMMMMMMMM").width / 10;
  const even = Math.abs(context.measureText("iiiiiiiiii").width / 10 - cell) < 0.01;
  return (text, kind) => {
    if (kind === EMPTY) return 4;
    if (kind === BORDER) {
      context.font = small;
      const wide = context.measureText(text).width + 12;
      context.font = font;
      return wide;
    }
    if (kind === SIGN && text === "⇥") return 4 * cell;
    return even && /^[\x20-\x7e]*$/.test(text) ? text.length * cell : context.measureText(text).width;
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
  Object.assign(view, { layout, tokenRow: tokenRows(layout), layoutOf: doc.text_key });
  ui.tall.style.height = `${layout.rows * ROW + 2 * PAD}px`;
  view.tall = clamp(layout.rows * ROW + 2 * PAD, 60, view.model.get("height"));
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
  const label = metric ? `, coloured by ${metric.title}` : "";
  ui.canvas.setAttribute("aria-label", `${format(doc.total)} tokens${label}`);
}

function sceneOf(view) {
  const { doc, ui } = view;
  const scene = { layout: view.layout, levels: view.levels, ramp: view.ramp, colours: view.colours, metric: view.metric };
  Object.assign(scene, { font: view.colours.font, small: view.small, gutter: view.gutter, profile: view.profile });
  Object.assign(scene, { width: view.width, height: ui.scroller.clientHeight, top: ui.scroller.scrollTop });
  Object.assign(scene, { targets: doc.targets, borders: doc.borders, tokenRow: view.tokenRow, hits: view.hits, hit: view.hit });
  return Object.assign(scene, { selected: view.selected, cursor: view.cursor, range: view.range, focused: view.focused });
}

export function draw(view) {
  view.frame = 0;
  const { ui, stale } = view;
  if (!view.doc.total) Object.assign(ui.root.dataset, { painted: view.doc.key, first: -1, last: -1, tokens: 0 });
  if (!ui.frame.clientWidth) return; // not shown: the next change of size draws it
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
  const scene = sceneOf(view);
  const [first, stop] = paintRows(ui.canvas, scene);
  paintMinimap(ui.minimap, scene, MINIMAP - 8, height);
  const shown = stop > first ? [view.layout.token[view.layout.rowStart[first]], view.layout.token[view.layout.rowStart[stop] - 1]] : [];
  Object.assign(ui.root.dataset, { painted: view.doc.key, first: shown[0] ?? -1, last: shown[1] ?? -1, tokens: view.doc.total });
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

// -- what is said -----------------------------------------------------------------------------------------------------

export function describe(view, token) {
  const { doc, metric } = view;
  const text = textOfRange(doc.tokens, token, token);
  const parts = [`token ${format(token)}: “${text === "" ? "part of a character" : visibleText(text, 60)}”`];
  if (metric) parts.push(`${metric.title} ${withUnit(metric, metric.values[token])}`);
  if (doc.targetLabels.has(token)) parts.push(visibleText(doc.targetLabels.get(token)));
  if (doc.borders.has(token)) parts.push(`chunk ${doc.borders.get(token)} begins`);
  return parts.join(" · ");
}

export function say(view, text) {
  view.ui.status.textContent = text;
}

export function showTip(view, token) {
  const { ui, doc } = view;
  view.tipped = token;
  if (token < 0 || !view.layout || token >= doc.total) return hideTip(ui.tip);
  const canvas = ui.canvas.getBoundingClientRect();
  const [{ row, x, width }] = rectsOf(view.layout, token);
  const top = canvas.top + PAD + row * ROW - ui.scroller.scrollTop;
  if (top < canvas.top - ROW || top > canvas.bottom) return hideTip(ui.tip);
  const text = textOfRange(doc.tokens, token, token);
  const known = view.answers.of(token);
  const facts = { token, total: doc.total, text, metrics: doc.metrics, chosen: view.metric, target: doc.targetLabels.get(token) };
  fillTip(ui.tip, { ...facts, alternatives: known, waiting: known === null });
  const left = canvas.left + view.gutter + x;
  placeTip(ui.tip, { left, right: left + width, top, bottom: top + ROW });
}

// -- moving -----------------------------------------------------------------------------------------------------------

/** The cursor goes to a token; with `extend` what is between is marked. */
export function moveTo(view, token, { extend = false, centred = false, tip = true } = {}) {
  if (!view.doc.total) return;
  const to = clamp(token, 0, view.doc.total - 1);
  if (extend) {
    view.anchor = view.range ? view.anchor : view.cursor < 0 ? to : view.cursor;
    view.range = [Math.min(view.anchor, to), Math.max(view.anchor, to)];
  } else view.range = null;
  view.cursor = to;
  const many = view.range && view.range[1] - view.range[0] + 1;
  say(view, many ? `${format(many)} ${many > 1 ? "tokens" : "token"} marked, to ${describe(view, to)}` : describe(view, to));
  bring(view, to, centred);
  hideTip(view.ui.tip);
  if (tip) requestAnimationFrame(() => requestAnimationFrame(() => view.cursor === to && view.focused && showTip(view, to)));
}

export function select(view, token) {
  view.selected = token;
  put(view.model, "selected", token);
  say(view, token < 0 ? "nothing selected" : `selected ${describe(view, token)}`);
  schedule(view);
}

export function rowsAway(view, rows) {
  const { layout } = view;
  const piece = rows < 0 ? pieceOf(layout, view.cursor) : layout.tokenPiece[view.cursor + 1] - 1; // one of several rows is left
  const row = rowOf(layout, piece);
  const x = (view.column ??= layout.x[piece] + layout.width[piece] / 2);
  const to = clamp(row + rows, 0, layout.rows - 1);
  return to === row ? (rows < 0 ? 0 : view.doc.total - 1) : tokenAt(layout, to, x);
}

export function rowEnd(view, last) {
  const row = rowOf(view.layout, pieceOf(view.layout, view.cursor));
  return view.layout.token[last ? view.layout.rowStart[row + 1] - 1 : view.layout.rowStart[row]];
}

export function jump(view, by) {
  const tokens = (view.highest ??= highestTokens(view.metric));
  if (!tokens.length) return say(view, "no values to go to");
  view.highestAt = view.highestAt < 0 ? (by > 0 ? 0 : tokens.length - 1) : (view.highestAt + by + tokens.length) % tokens.length;
  moveTo(view, tokens[view.highestAt], { centred: true });
  say(view, `highest value ${view.highestAt + 1} of ${tokens.length} · ${describe(view, view.cursor)}`);
}

export function search(view, by) {
  const query = view.ui.find.value;
  if (query !== view.query) {
    const { tokens } = view.doc;
    Object.assign(view, { query, hits: hitTokens(tokens.starts, findAll(tokens.text, query)), hit: -1 });
    const from = view.cursor >= 0 ? view.cursor : view.layout ? firstVisible(view) : 0;
    if (view.hits.length) view.hit = Math.max(view.hits.findIndex(([first]) => first >= from), 0);
  } else if (view.hits.length) view.hit = (view.hit + by + view.hits.length) % view.hits.length;
  const many = view.hits.length >= MOST_HITS ? `${format(MOST_HITS)}+` : format(view.hits.length);
  view.ui.count.textContent = query ? (view.hits.length ? `${format(view.hit + 1)} of ${many}` : "none") : "";
  if (view.hits.length) moveTo(view, view.hits[view.hit][0], { centred: true, tip: false });
  if (query) say(view, view.hits.length ? `match ${view.ui.count.textContent} · ${describe(view, view.cursor)}` : `“${visibleText(query)}” not found`);
  schedule(view);
}

export function textToCopy(view) {
  if (view.range) return textOfRange(view.doc.tokens, ...view.range);
  const token = view.cursor >= 0 ? view.cursor : view.selected;
  return token >= 0 ? lineOf(view.doc.tokens, token) : "";
}

export function copied(view, text) {
  say(view, text ? `copied ${format(text.length)} characters` : "nothing to copy: select a token or mark text");
}

/** By the button. */
export function copyNow(view) {
  const text = textToCopy(view);
  if (text) copyText(text, view.ui.root).then(() => view.ui.copy.focus());
  copied(view, text);
}
