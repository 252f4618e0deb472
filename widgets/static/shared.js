// Functions that all widgets share: numbers as text, elements, drawings, the model. `widgets.core.assets.script` inlines this
// module into every widget. Text reaches the page through textContent alone.

const SVG = "http://www.w3.org/2000/svg";

// -- numbers ----------------------------------------------------------------------------------------------------------

/** A typed array with a copy of a view's bytes; null without a view. */
export const typed = (view, Kind) =>
  view ? new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength)) : null;
export const floats = (view) => typed(view, Float32Array);
export const counts = (view) => typed(view, Uint32Array);

/** The data of a trait that Python sends as one buffer (widgets/core/packing.py); arrays in it are views into the buffer. */
export function unpacked(view) {
  const begin = view.byteOffset + 4 + view.getUint32(0, true);
  const header = new TextDecoder().decode(new Uint8Array(view.buffer, view.byteOffset + 4, begin - view.byteOffset - 4));
  return JSON.parse(header, (name, value) =>
    Array.isArray(value?.$bytes) ? new DataView(view.buffer, begin + value.$bytes[0], value.$bytes[1]) : value,
  );
}

/** About `count` round numbers inside [low, high]. */
export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + step * 1e-6; i++) found.push(Number((i * step).toPrecision(12)));
  return found.length < 2 && count < 20 ? ticks(low, high, count + 1) : found; // one number alone is no scale
}

/** Lowest and highest finite value of some arrays, with a margin if `widened`; null without finite values. */
export function extent(arrays, pad = 0, widened = true) {
  let [low, high] = [Infinity, -Infinity];
  for (const array of arrays) {
    for (const value of array) {
      if (!Number.isFinite(value)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) return null;
  if (!widened) return [low, high];
  const margin = low === high ? Math.max(Math.abs(low) * 0.05, 0.5 * (pad || 1)) : (high - low) * pad;
  return [low - margin, high + margin];
}

/** Index of the last value of the ascending `xs` that is at most `x`; 0 if all are greater. */
export function lastAtMost(xs, x, count = xs.length) {
  let [low, high] = [0, count];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return low;
}

/** Index of the value of the ascending `xs` that is nearest to `x`. */
export function nearest(xs, x) {
  const low = lastAtMost(xs, x);
  return low + 1 < xs.length && xs[low + 1] - x < x - xs[low] ? low + 1 : low;
}

export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

export function format(value) {
  if (!Number.isFinite(value)) return "not finite";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

/**
 * Returns a function that writes numbers like `format`, but all with the same number of significant digits: as many as `values`
 * need to differ, 4 or 5, without the last ones that are 0 in all of them.
 */
export function alike(values) {
  const finite = values.filter(Number.isFinite);
  if (finite.every(Number.isInteger)) return format;
  const rounded = (digits) => finite.map((value) => Number(value.toPrecision(digits)));
  const most = new Set(rounded(4)).size < new Set(finite).size ? 5 : 4;
  const wanted = rounded(most);
  let digits = 1;
  while (digits < most && rounded(digits).some((value, i) => value !== wanted[i])) digits++;
  return (value) => {
    const size = Math.abs(value);
    if (!Number.isFinite(value)) return format(value);
    if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(Math.max(digits - 1, 2));
    return value.toLocaleString("en", { minimumSignificantDigits: digits, maximumSignificantDigits: digits });
  };
}

/** A number with its noun, in the plural unless the number is 1. */
export const quantity = (count, noun) => `${format(count)} ${noun}${count === 1 ? "" : "s"}`;

/** Texts of ticks: like `format` where that is exact for all of them, else with as many decimals as their distance needs. */
export function tickTexts(values) {
  const plain = values.map(format);
  const shown = plain.map((text) => Number(text.replaceAll(",", "")));
  if (values.length < 2 || values.every((value, i) => Math.abs(shown[i] - value) <= 1e-9 * Math.abs(value))) return plain;
  const step = Math.min(...values.slice(1).map((value, i) => Math.abs(value - values[i])));
  const digits = clamp(Math.ceil(-Math.log10(step) - 1e-9), 0, 12);
  const options = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return values.map((value) => value.toLocaleString("en", options));
}

export function duration(seconds) {
  const total = Math.max(0, Math.round(seconds));
  const [h, m, s] = [Math.floor(total / 3600), Math.floor(total / 60) % 60, total % 60];
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

// -- elements ---------------------------------------------------------------------------------------------------------

function built(node, attributes, parent, text) {
  const named = typeof attributes === "string" ? { class: attributes } : attributes;
  for (const [key, value] of Object.entries(named)) if (value !== "") node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

/** A new element at the end of `parent`, with its attributes (a string is the class) and text. */
export const html = (name, attributes, parent, text) => built(document.createElement(name), attributes, parent, text);
export const svg = (name, attributes, parent, text) => built(document.createElementNS(SVG, name), attributes, parent, text);

export function button(parent, text, press, attributes = {}) {
  const node = html("button", { type: "button", ...attributes }, parent, text);
  node.addEventListener("click", press);
  return node;
}

/** Attributes of a label that the glossary explains in a tooltip; none without an explanation. */
export const explained = (help) => (help ? { class: "explained", title: help } : {});

/** The root of a widget, a group that screen readers call `label`, and at its top the line for errors. */
export function rootOf(el, name, label) {
  const root = html("div", { class: `refine-lab ${name}`, role: "group", "aria-label": label }, el);
  return { root, error: html("div", { class: "error", role: "alert" }, root) };
}

/** A figure with a title, which may have a tooltip, its unit, and a drawing. */
export function panel(parent, title, unit, attributes, help = "") {
  const figure = html("figure", "panel", parent);
  const caption = html("figcaption", "title", figure);
  html("span", explained(help), caption, title);
  return { figure, unit: html("span", "unit", caption, unit), svg: svg("svg", attributes, figure) };
}

/** Draws axes with round numbers. Returns scales from values to pixels, and the inner edges of the drawing. */
export function axes(drawing, { height, margin, count, xTicks = () => true }, xs, ys, xLabel) {
  const width = Math.max(drawing.clientWidth || 260, 150);
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const inner = { left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom };
  const sx = (x) => inner.left + ((x - xs[0]) / (xs[1] - xs[0])) * (inner.right - inner.left);
  const sy = (y) => inner.bottom - ((y - ys[0]) / (ys[1] - ys[0])) * (inner.bottom - inner.top);
  const rows = ticks(...ys, count);
  tickTexts(rows).forEach((text, i) => {
    const y = sy(rows[i]);
    svg("line", { class: "grid", x1: inner.left, x2: inner.right, y1: y, y2: y }, drawing);
    svg("text", { x: inner.left - 6, y: y + 4, "text-anchor": "end" }, drawing, text);
  });
  const columns = ticks(...xs, count).filter(xTicks);
  tickTexts(columns).forEach((text, i) => {
    svg("text", { x: sx(columns[i]), y: inner.bottom + 15, "text-anchor": "middle" }, drawing, text);
  });
  svg("text", { x: (inner.left + inner.right) / 2, y: height - 3, "text-anchor": "middle" }, drawing, xLabel);
  return { sx, sy, inner };
}

/** The context of a canvas, cleared and resized to `width` x `height` CSS pixels at the resolution of the screen. */
export function prepared(canvas, width, height) {
  const scale = globalThis.devicePixelRatio || 1;
  const [w, h] = [Math.max(Math.round(width * scale), 1), Math.max(Math.round(height * scale), 1)];
  if (canvas.width !== w || canvas.height !== h) {
    Object.assign(canvas, { width: w, height: h });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// -- the model --------------------------------------------------------------------------------------------------------

export function put(model, trait, value) {
  model.set(trait, value);
  model.save_changes();
}

/**
 * Calls each of `listeners`, by trait, now and whenever its trait changes; an element as listener has the trait as its text.
 * Returns a function that ends this, and calls `ends` too.
 */
export function follow(model, listeners, ...ends) {
  const calls = Object.entries(listeners).map(([trait, listener]) => [
    trait,
    typeof listener === "function" ? listener : () => (listener.textContent = model.get(trait)),
  ]);
  for (const [trait, call] of calls) model.on(`change:${trait}`, call);
  for (const call of new Set(calls.map(([, call]) => call))) call();
  return () => {
    for (const [trait, call] of calls) model.off(`change:${trait}`, call);
    for (const end of ends) end();
  };
}

/** Marks a field whose text Python has not answered `count` times: buttons of its panel wait for the answer (notice.js). */
export function unanswered(root, count) {
  if (count) root.dataset.unanswered = count;
  else {
    delete root.dataset.unanswered;
    root.dispatchEvent(new CustomEvent("refine-answered", { bubbles: true }));
  }
}

/** A function that requests a drawing in the next frame, once however often it is called; `cancel` withdraws the request. */
export function inFrames(draw) {
  let frame = 0;
  const schedule = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  };
  schedule.cancel = () => {
    cancelAnimationFrame(frame);
    frame = 0;
  };
  return schedule;
}

/** Calls `act` when an element's width changes, not its height, which drawing changes. Returns a function that ends this. */
export function onWidth(element, act) {
  let width = 0;
  const resized = new ResizeObserver(([{ contentRect }]) => {
    if (Math.abs(contentRect.width - width) < 1) return;
    width = contentRect.width;
    act();
  });
  resized.observe(element);
  return () => resized.disconnect();
}

/** Calls `act` once, as soon as a hidden element has a width. Returns a function that ends this. */
export function onceShown(element, act) {
  const shown = new ResizeObserver(([{ contentRect }]) => {
    if (!contentRect.width) return;
    shown.disconnect();
    act();
  });
  shown.observe(element);
  return () => shown.disconnect();
}

/**
 * Calls `act` when the colours of `root` change with the theme of JupyterLab, VS Code or the system. A canvas must be drawn
 * again then, unlike elements. Returns a function that ends this.
 */
export function onTheme(root, act) {
  const colours = () => {
    const style = getComputedStyle(root);
    return ["--ink", "--quiet", "--ground", "--accent", "--series-1"].map((name) => style.getPropertyValue(name)).join();
  };
  let before = colours();
  let timer = 0;
  const check = () => {
    const now = colours();
    if (now === before) return;
    before = now;
    act();
  };
  const changed = () => {
    check();
    clearTimeout(timer);
    timer = setTimeout(check, 500); // a style sheet may come later than the attribute
  };
  const attributes = ["class", "style", "data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind", "data-vscode-theme-id"];
  const observer = new MutationObserver(changed);
  for (const node of [document.documentElement, document.body]) observer.observe(node, { attributes: true, attributeFilter: attributes });
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", changed);
  return () => {
    clearTimeout(timer);
    observer.disconnect();
    scheme.removeEventListener("change", changed);
  };
}

/** Marks a key as handled: neither the browser nor JupyterLab acts on it too. */
export function takeKey(event) {
  event.preventDefault();
  event.stopPropagation();
}

/** Keeps from JupyterLab the keys that it would take for commands; those with Ctrl only if they are among `commands`. */
export function keepKeys(event, commands = "") {
  const command = event.ctrlKey || event.metaKey;
  if (event.key !== "Tab" && (!command || commands.includes(event.key.toLowerCase()))) event.stopPropagation();
}

/** Copies a text, through a selected text area if the page must not write to the clipboard. Returns whether it is copied. */
export async function copyText(text, parent) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = html("textarea", "unseen", parent);
    area.value = text;
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
