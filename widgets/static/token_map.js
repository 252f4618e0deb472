// A document of many tokens as coloured text. Python sends the text (UTF-16), where tokens begin, and the metrics (float32
// bytes), whole; the page lays them out, paints what is visible, and moves in it. Text reaches the page through canvas and
// textContent alone.

import { follow, html, keepLetters, put, takeKey, unpacked } from "./shared.js";
import { PAD, ROW, mapHeight } from "./token_paint.js";
import { buildPanel, hideTip } from "./token_panel.js";
import { Answers } from "./token_alternatives.js";
import { bring, copied, copyNow, describe, draw, firstVisible, jump, moveTo, rowEnd, rowsAway, say, schedule, search, select, showTip, textToCopy, tokenUnder, unpackDocument } from "./token_view.js";

const VIEW_PAUSE = 150; // milliseconds without scrolling before Python hears of it

// -- data that came ---------------------------------------------------------------------------------------------------

function takeDocument(view) {
  const { ui, model } = view;
  const before = view.doc;
  const doc = unpackDocument(unpacked(model.get("document")));
  view.answers?.stop();
  view.doc = doc;
  view.answers = new Answers(model, doc, (token) => token === view.tipped && showTip(view, token));
  if (before?.text_key !== doc.text_key) {
    Object.assign(view, { cursor: -1, range: null, hits: [], hit: -1, query: "", highest: null, tipped: -1 });
    ui.find.value = ui.count.textContent = "";
    hideTip(ui.tip);
    say(view, doc.total ? "" : "No document yet.");
  }
  ui.metric.replaceChildren(...doc.metrics.map((metric) => Object.assign(html("option", "", null, metric.title), { value: metric.name })));
  ui.colour.hidden = doc.metrics.length < 2;
  ui.highest.hidden = !doc.metrics.length;
  ui.root.classList.toggle("empty", !doc.total);
  schedule(view, { layout: true });
}

function takeSelected(view) {
  const token = view.model.get("selected");
  if (token === view.selected) return;
  view.selected = token;
  if (token >= 0 && token < view.doc.total) {
    view.cursor = token;
    bring(view, token, true);
    say(view, `selected ${describe(view, token)}`);
  }
  schedule(view);
}

function takeView(view) {
  const token = view.model.get("view");
  if (view.layout && token !== firstVisible(view)) bring(view, token, "top");
}

// -- what the user does -----------------------------------------------------------------------------------------------

function pressed(view, event) {
  const page = Math.max(Math.floor(view.ui.scroller.clientHeight / ROW) - 1, 1);
  const extend = event.shiftKey;
  const column = view.column;
  view.column = null;
  const down = (rows) => {
    view.column = column;
    return moveTo(view, rowsAway(view, rows), { extend });
  };
  const far = event.ctrlKey || event.metaKey;
  const keys = {
    ArrowLeft: () => moveTo(view, view.cursor - 1, { extend }),
    ArrowRight: () => moveTo(view, view.cursor + 1, { extend }),
    ArrowUp: () => down(-1),
    ArrowDown: () => down(1),
    PageUp: () => down(-page),
    PageDown: () => down(page),
    Home: () => moveTo(view, far ? 0 : rowEnd(view, false), { extend }),
    End: () => moveTo(view, far ? view.doc.total - 1 : rowEnd(view, true), { extend }),
    Enter: () => select(view, view.cursor),
    " ": () => select(view, view.cursor),
  };
  if (keys[event.key] && view.cursor < 0) moveTo(view, firstVisible(view));
  else keys[event.key]?.();
  return event.key in keys;
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
}

/** Take away what is marked, found or selected, in this order; false where there was nothing. */
function clear(view) {
  hideTip(view.ui.tip);
  if (view.range) view.range = null;
  else if (view.hits.length) Object.assign(view, { hits: [], hit: -1, query: "" });
  else if (view.selected >= 0) select(view, -1);
  else return false;
  view.ui.count.textContent = view.hits.length ? view.ui.count.textContent : "";
  schedule(view);
  return true;
}

function onFindKey(view, event) {
  if (event.key === "Enter") search(view, event.shiftKey ? -1 : 1);
  else if (event.key === "Escape") view.ui.canvas.focus({ preventScroll: true });
  else return;
  takeKey(event);
}

function listenToPointer(view, on) {
  const { canvas, minimap, scroller, tip } = view.ui;
  let start = -1;
  on(canvas, "pointerdown", (event) => {
    start = event.button === 0 && view.layout ? tokenUnder(view, event) : -1;
    if (start < 0) return;
    canvas.focus({ preventScroll: true });
    moveTo(view, start, { extend: event.shiftKey, tip: false });
    if (!event.shiftKey) canvas.setPointerCapture(event.pointerId);
    else start = -1;
  });
  on(canvas, "pointermove", (event) => {
    if (!view.layout || !view.doc.total) return;
    if (start < 0 || !event.buttons) return hover(view, tokenUnder(view, event));
    const token = tokenUnder(view, event, false);
    if (token !== view.cursor) moveTo(view, token, { extend: true, tip: false });
  });
  on(canvas, "pointerup", () => {
    if (start >= 0 && !view.range) select(view, start);
    start = -1;
  });
  on(canvas, "pointercancel", () => (start = -1));
  on(canvas, "pointerleave", () => hover(view, -1));
  on(scroller, "scroll", () => {
    hideTip(tip);
    schedule(view);
    clearTimeout(view.timer);
    view.timer = setTimeout(() => tellView(view), VIEW_PAUSE);
  });
  const go = (event) => {
    const y = event.clientY - minimap.getBoundingClientRect().top;
    const whole = view.layout.rows * ROW + 2 * PAD;
    scroller.scrollTop = (y / mapHeight(view.layout.rows, scroller.clientHeight)) * whole - scroller.clientHeight / 2;
  };
  on(minimap, "pointerdown", (event) => {
    minimap.setPointerCapture(event.pointerId);
    if (view.layout) go(event);
  });
  on(minimap, "pointermove", (event) => event.buttons && view.layout && go(event));
  on(minimap, "wheel", (event) => (scroller.scrollTop += event.deltaY));
}

function hover(view, token) {
  if (token === view.tipped && view.ui.tip.matches(":popover-open")) return;
  showTip(view, token);
}

function tellView(view) {
  if (!view.layout || !view.doc.total || firstVisible(view) === view.model.get("view")) return;
  put(view.model, "view", firstVisible(view));
}

function listenToControls(view, on) {
  const { ui, model } = view;
  on(ui.canvas, "keydown", (event) => onKey(view, event));
  on(ui.canvas, "focus", () => {
    view.focused = true;
    schedule(view);
  });
  on(ui.canvas, "blur", () => {
    view.focused = false;
    hideTip(ui.tip);
    schedule(view);
  });
  on(ui.canvas, "copy", (event) => {
    const text = textToCopy(view);
    copied(view, text);
    if (!text) return;
    event.clipboardData.setData("text/plain", text);
    takeKey(event);
  });
  on(ui.metric, "change", () => put(model, "metric", ui.metric.value));
  on(ui.find, "keydown", (event) => onFindKey(view, event));
  on(ui.find, "input", () => search(view, 1));
  on(ui.bar, "keydown", keepLetters);
  for (const [button, act] of [
    [ui.next, () => jump(view, 1)],
    [ui.previous, () => jump(view, -1)],
    [ui.forth, () => search(view, 1)],
    [ui.back, () => search(view, -1)],
    [ui.copy, () => copyNow(view)],
  ]) on(button, "click", () => view.layout && act());
}

// -- the widget -------------------------------------------------------------------------------------------------------

function render({ model, el }) {
  const ui = buildPanel(el);
  const view = { model, ui, stale: {}, frame: 0, timer: 0, selected: -1, cursor: -1, range: null, hits: [], hit: -1, query: "" };
  Object.assign(view, { wanted: -1, tipped: -1, focused: false, column: null, resized: false, doc: null, layout: null });
  const on = (node, event, listener) => node.addEventListener(event, listener);
  listenToPointer(view, on);
  listenToControls(view, on);
  const receive = (content, buffers) => view.answers.receive(content, buffers);
  model.on("msg:custom", receive);
  const stop = follow(model, {
    status: () => say(view, model.get("status")),
    document: () => takeDocument(view),
    metric: () => schedule(view, { colour: true }),
    selected: () => takeSelected(view),
    view: () => takeView(view),
    height: () => schedule(view, { layout: true }),
    error: () => (ui.error.textContent = model.get("error")),
  });

  const resized = new ResizeObserver(() => {
    const width = ui.frame.clientWidth;
    view.resized ||= width > 0 && view.layout !== null && Math.abs(ui.frame.clientHeight - view.tall) > 1; // by its corner
    schedule(view, width === view.laidOut ? {} : { layout: true });
    view.laidOut = width;
  });
  resized.observe(ui.frame);
  const restyle = () => schedule(view, { layout: true });
  const themed = new MutationObserver(restyle);
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name"] });
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", restyle);
  document.fonts?.ready.then(restyle);
  draw(view);

  return () => {
    cancelAnimationFrame(view.frame);
    clearTimeout(view.timer);
    view.answers.stop();
    resized.disconnect();
    themed.disconnect();
    scheme.removeEventListener("change", restyle);
    stop();
    model.off("msg:custom", receive);
    hideTip(ui.tip);
  };
}

export default { render };
