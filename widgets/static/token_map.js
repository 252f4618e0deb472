// A document of many tokens as coloured text. Python sends the whole text (UTF-16), the offsets of the tokens, and the metrics
// (float32 bytes); the page lays the tokens out, paints the visible ones, and moves among them. Text reaches the page through
// canvas and textContent alone.

import { follow, html, keepKeys, onTheme, put, takeKey, unpacked } from "./shared.js";
import { PAD, ROW, mapHeight } from "./token_paint.js";
import { buildPanel, hideTip } from "./token_panel.js";
import { savePicture } from "./token_picture.js";
import { Answers } from "./token_alternatives.js";
import { announce, announceToken, bring, copy, draw, firstVisible, jump, moveTo } from "./token_view.js";
import { rowEnd, rowsAway, schedule, search, select, showTip, tokenUnder, unpackDocument } from "./token_view.js";

const VIEW_PAUSE = 150; // milliseconds without scrolling before Python gets the view

// -- data from Python -------------------------------------------------------------------------------------------------

function takeDocument(view) {
  const { ui, model } = view;
  const before = view.doc;
  const doc = (view.doc = unpackDocument(unpacked(model.get("document"))));
  view.answers?.stop();
  view.answers = new Answers(model, doc, (token) => token === view.tipped && showTip(view, token));
  if (before?.text_key !== doc.text_key) {
    Object.assign(view, { cursor: -1, range: null, hits: [], hit: -1, query: "", highest: null, tipped: -1 });
    ui.find.value = ui.count.textContent = "";
    hideTip(ui.tip);
    announce(view, doc.total ? "" : "No document yet.");
  }
  ui.metric.replaceChildren(...doc.metrics.map(({ name, title, help }) => html("option", { value: name, title: help ?? "" }, null, title)));
  ui.colour.hidden = doc.metrics.length < 2;
  ui.highest.hidden = !doc.metrics.length;
  ui.root.classList.toggle("empty", !doc.total);
  const placed = view.layout && before?.text_key === doc.text_key && String(before.chunk_borders) === String(doc.chunk_borders);
  schedule(view, placed ? { colour: true } : { layout: true });
}

function takeSelected(view) {
  const token = view.model.get("selected");
  if (token === view.selected) return;
  view.selected = token;
  if (token >= 0 && token < view.doc.total) {
    view.cursor = token;
    bring(view, token, true);
    announceToken(view, "selected ", token);
  }
  schedule(view);
}

/** Python gets the highlighted text, and may set it. */
function giveHighlight(view) {
  const range = view.range ?? [];
  if (String(range) !== String(view.model.get("highlight"))) put(view.model, "highlight", range);
}

function takeHighlight(view) {
  const range = view.model.get("highlight");
  if (String(range) === String(view.range ?? [])) return;
  const [first, last] = range;
  if (last >= view.doc.total) return;
  view.range = range.length ? [first, last] : null;
  if (view.range) {
    Object.assign(view, { anchor: first, cursor: last });
    bring(view, first, true);
    announceToken(view, "highlighted ", first);
  }
  schedule(view);
}

function takeView(view) {
  const token = view.model.get("view");
  if (view.layout && token !== firstVisible(view)) bring(view, token, "top");
}

// -- keys and pointer -------------------------------------------------------------------------------------------------

function pressed(view, { key, shiftKey: extend, ctrlKey, metaKey }) {
  const page = Math.max(Math.floor(view.ui.scroller.clientHeight / ROW) - 1, 1);
  const rows = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page }[key];
  const far = ctrlKey || metaKey;
  const tokens = {
    ArrowLeft: () => view.cursor - 1,
    ArrowRight: () => view.cursor + 1,
    Home: () => (far ? 0 : rowEnd(view, false)),
    End: () => (far ? view.doc.total - 1 : rowEnd(view, true)),
  };
  if (!rows || view.cursor < 0) view.column = null; // the column holds along vertical moves
  if (!rows && !(key in tokens) && !["Enter", " "].includes(key)) return false;
  if (view.cursor < 0) moveTo(view, firstVisible(view));
  else if (rows) moveTo(view, rowsAway(view, rows), { extend });
  else if (key in tokens) moveTo(view, tokens[key](), { extend });
  else select(view, view.cursor);
  return true;
}

function onKey(view, event) {
  const { key } = event;
  const command = event.ctrlKey || event.metaKey;
  if (!view.doc.total || !view.layout || event.altKey) return;
  let handled = true;
  if (command && key.toLowerCase() === "c") return event.stopPropagation(); // the browser makes a copy event of it
  if (key === "/" || (command && key.toLowerCase() === "f")) view.ui.find.select();
  else if (command && !["Home", "End"].includes(key)) handled = false;
  else if (key === "n" || key === "p") jump(view, key === "n" ? 1 : -1);
  else if (key === "Escape") handled = clear(view);
  else handled = pressed(view, event);
  if (handled) takeKey(event);
  giveHighlight(view);
}

/** Clears the mark, the search or the selection, the first of them that is set; false if none is. */
function clear(view) {
  hideTip(view.ui.tip);
  if (view.range) view.range = null;
  else if (view.hits.length) Object.assign(view, { hits: [], hit: -1, query: "" });
  else if (view.selected >= 0) select(view, -1);
  else return false;
  if (!view.hits.length) view.ui.count.textContent = "";
  schedule(view);
  return true;
}

function onFindKey(view, event) {
  if (event.key === "Enter") search(view, event.shiftKey ? -1 : 1);
  else if (event.key === "Escape") view.ui.canvas.focus({ preventScroll: true });
  else return;
  takeKey(event);
}

const on = (node, event, listener) => node.addEventListener(event, listener);

function listenToPointer(view) {
  const { canvas, minimap, scroller, tip } = view.ui;
  let start = -1;
  on(canvas, "pointerdown", (event) => {
    start = event.button === 0 && view.layout ? tokenUnder(view, event) : -1;
    if (start < 0) return;
    canvas.focus({ preventScroll: true });
    moveTo(view, start, { extend: event.shiftKey, tip: false });
    if (!event.shiftKey) return canvas.setPointerCapture(event.pointerId);
    start = -1;
    giveHighlight(view);
  });
  on(canvas, "pointermove", (event) => {
    if (!view.layout || !view.doc.total) return;
    if (start < 0 || !event.buttons) return hover(view, tokenUnder(view, event));
    const token = tokenUnder(view, event, false);
    if (token !== view.cursor) moveTo(view, token, { extend: true, tip: false });
  });
  on(canvas, "pointerup", () => {
    if (start >= 0 && !view.range) select(view, start);
    if (start >= 0) giveHighlight(view);
    start = -1;
  });
  on(canvas, "pointercancel", () => (start = -1));
  on(canvas, "pointerleave", () => hover(view, -1));
  on(scroller, "scroll", () => {
    hideTip(tip);
    schedule(view);
    clearTimeout(view.timer);
    view.timer = setTimeout(() => {
      const first = view.layout && view.doc.total ? firstVisible(view) : view.model.get("view");
      if (first !== view.model.get("view")) put(view.model, "view", first);
    }, VIEW_PAUSE);
  });
  const go = (event) => {
    if (!event.buttons || !view.layout) return;
    minimap.setPointerCapture(event.pointerId);
    const y = event.clientY - minimap.getBoundingClientRect().top;
    const height = view.layout.rows * ROW + 2 * PAD;
    scroller.scrollTop = (y / mapHeight(view.layout.rows, scroller.clientHeight)) * height - scroller.clientHeight / 2;
  };
  for (const type of ["pointerdown", "pointermove"]) on(minimap, type, go);
  on(minimap, "wheel", (event) => (scroller.scrollTop += event.deltaY));
}

function hover(view, token) {
  if (token !== view.tipped || !view.ui.tip.matches(":popover-open")) showTip(view, token);
}

function listenToControls(view) {
  const { ui, model } = view;
  on(ui.canvas, "keydown", (event) => onKey(view, event));
  for (const type of ["focus", "blur"]) {
    on(ui.canvas, type, () => {
      view.focused = type === "focus";
      if (!view.focused) hideTip(ui.tip);
      schedule(view);
    });
  }
  on(ui.canvas, "copy", (event) => copy(view, event) && takeKey(event));
  on(ui.metric, "change", () => put(model, "metric", ui.metric.value));
  on(ui.find, "keydown", (event) => onFindKey(view, event));
  on(ui.find, "input", () => search(view, 1));
  on(ui.bar, "keydown", (event) => keepKeys(event));
  for (const [button, act] of [
    [ui.next, () => jump(view, 1)],
    [ui.previous, () => jump(view, -1)],
    [ui.forth, () => search(view, 1)],
    [ui.back, () => search(view, -1)],
    [ui.copy, (event) => copy(view, event)],
    [ui.picture, () => savePicture(view, Math.floor(ui.scroller.scrollTop / ROW))],
  ]) on(button, "click", (event) => view.layout && act(event));
}

// -- the widget -------------------------------------------------------------------------------------------------------

function render({ model, el }) {
  const ui = buildPanel(el);
  const view = { model, ui, stale: {}, frame: 0, timer: 0, selected: -1, cursor: -1, range: null, hits: [], hit: -1, query: "" };
  Object.assign(view, { wanted: -1, tipped: -1, focused: false, column: null, resized: false, doc: null, layout: null });
  listenToPointer(view);
  listenToControls(view);
  const receive = (content, buffers) => view.answers.receive(content, buffers);
  model.on("msg:custom", receive);
  const resized = new ResizeObserver(() => {
    const width = ui.frame.clientWidth;
    view.resized ||= width > 0 && view.layout !== null && Math.abs(ui.frame.clientHeight - view.tall) > 1; // by its corner
    schedule(view, width === view.laidOut ? {} : { layout: true });
    view.laidOut = width;
  });
  const restyle = () => schedule(view, { layout: true });
  const endTheme = onTheme(ui.root, restyle);
  const stop = () => {
    cancelAnimationFrame(view.frame);
    clearTimeout(view.timer);
    view.answers.stop();
    resized.disconnect();
    endTheme();
    model.off("msg:custom", receive);
    hideTip(ui.tip);
  };
  const listeners = {
    status: ui.status,
    document: () => takeDocument(view),
    metric: () => schedule(view, { colour: true }),
    selected: () => takeSelected(view),
    highlight: () => takeHighlight(view),
    view: () => takeView(view),
    height: restyle,
    error: ui.error,
  };
  const end = follow(model, listeners, stop);
  resized.observe(ui.frame);
  document.fonts?.ready.then(restyle);
  draw(view);
  return end;
}

export default { render };
