// Functions that all widgets share: numbers as text, and elements. `widgets.core.assets.script` inlines this module into each.
// Text reaches the page through textContent alone.

const SVG = "http://www.w3.org/2000/svg";

// -- numbers ----------------------------------------------------------------------------------------------------------

/** A typed array of a view's own bytes; null where there is none. */
export function typed(view, Kind) {
  return view ? new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength)) : null;
}

export function floats(view) {
  return typed(view, Float32Array);
}

export function counts(view) {
  return typed(view, Uint32Array);
}

/** The data of a trait that Python sends as one buffer (widgets/core/packing.py); arrays in it are views into the buffer. */
export function unpacked(view) {
  const begin = view.byteOffset + 4 + view.getUint32(0, true);
  const header = new TextDecoder().decode(new Uint8Array(view.buffer, view.byteOffset + 4, begin - view.byteOffset - 4));
  return JSON.parse(header, (name, value) => {
    if (!Array.isArray(value?.$bytes)) return value;
    const [first, length] = value.$bytes;
    return new DataView(view.buffer, begin + first, length);
  });
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

/** Lowest and highest finite value of some arrays, where they are one and the same `widened`; null where there is none. */
export function extent(arrays, pad = 0, widened = true) {
  let low = Infinity;
  let high = -Infinity;
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

/** Index of the last value of rising `xs` that is at most `x`; 0 where none is. */
export function lastAtMost(xs, x, count = xs.length) {
  let [low, high] = [0, count];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return low;
}

/** Index of the value of rising `xs` that is nearest to `x`. */
export function nearest(xs, x) {
  const low = lastAtMost(xs, x);
  return low + 1 < xs.length && xs[low + 1] - x < x - xs[low] ? low + 1 : low;
}

export function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

export function format(value) {
  if (!Number.isFinite(value)) return "not finite";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en");
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2);
  return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 6 });
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

// -- elements ---------------------------------------------------------------------------------------------------------

export function html(name, className, parent, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

export function svg(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
}

export function button(parent, text, press, { title = "", label = "", className = "" } = {}) {
  const node = html("button", className, parent, text);
  node.type = "button";
  if (title) node.title = title;
  if (label) node.setAttribute("aria-label", label);
  if (press) node.addEventListener("click", press);
  return node;
}

/** The root of a widget, a group that screen readers call `label`, and the line above all else that says what went wrong. */
export function rootOf(el, name, label) {
  const root = html("div", `refine-lab ${name}`, el);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", label);
  const error = html("div", "error", root);
  error.setAttribute("role", "alert");
  return { root, error };
}

/** Axes with round numbers in a drawing of `height` pixels: scales from values to pixels, and the inner edges. */
export function axes(drawing, { height, margin, count, xTicks = () => true }, xs, ys, xLabel) {
  const width = Math.max(drawing.clientWidth || 260, 150);
  drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const inner = { left: margin.left, right: width - margin.right, top: margin.top, bottom: height - margin.bottom };
  const sx = (x) => inner.left + ((x - xs[0]) / (xs[1] - xs[0])) * (inner.right - inner.left);
  const sy = (y) => inner.bottom - ((y - ys[0]) / (ys[1] - ys[0])) * (inner.bottom - inner.top);
  for (const tick of ticks(...ys, count)) {
    svg("line", { class: "grid", x1: inner.left, x2: inner.right, y1: sy(tick), y2: sy(tick) }, drawing);
    svg("text", { x: inner.left - 6, y: sy(tick) + 4, "text-anchor": "end" }, drawing, format(tick));
  }
  for (const tick of ticks(...xs, count).filter(xTicks)) {
    svg("text", { x: sx(tick), y: inner.bottom + 15, "text-anchor": "middle" }, drawing, format(tick));
  }
  svg("text", { x: (inner.left + inner.right) / 2, y: height - 3, "text-anchor": "middle" }, drawing, xLabel);
  return { sx, sy, inner };
}

/** A canvas of `width` x `height` CSS pixels, cleared, in as many pixels as the screen has. */
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

/** Call each of `listeners`, by trait, now and whenever its trait changes; the function that ends it. */
export function follow(model, listeners) {
  for (const [trait, listener] of Object.entries(listeners)) model.on(`change:${trait}`, listener);
  for (const listener of new Set(Object.values(listeners))) listener();
  return () => {
    for (const [trait, listener] of Object.entries(listeners)) model.off(`change:${trait}`, listener);
  };
}

/** Functions that ask for a drawing in the next frame, once however often they are asked, and that take it back. */
export function inFrames(draw) {
  let frame = 0;
  const schedule = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  };
  const cancel = () => {
    cancelAnimationFrame(frame);
    frame = 0;
  };
  return { schedule, cancel };
}

/** Call `act` when an element's width changes, as drawing changes the height alone; the function that ends it. */
export function onWidth(element, act) {
  let width = 0;
  const resized = new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    act();
  });
  resized.observe(element);
  return () => resized.disconnect();
}

/** JupyterLab would act on the key too. */
export function takeKey(event) {
  event.preventDefault();
  event.stopPropagation();
}

/** Keep the keys of a field that JupyterLab would take for its commands; those with Ctrl are not the field's. */
export function keepLetters(event) {
  if (!event.ctrlKey && !event.metaKey && event.key !== "Tab") event.stopPropagation();
}

/** Copy a text, through a selection of our own where the page may not write to the clipboard; whether it is copied. */
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
