// What the widgets' modules share: numbers as people read them, and elements. `widgets.base.script` writes it into each.
// Text reaches the page through textContent alone.

const SVG = "http://www.w3.org/2000/svg";

// -- numbers ----------------------------------------------------------------------------------------------------------

export function floats(view) {
  if (!view) return null;
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

/** The data of a trait that Python sends as one buffer (widgets/packing.py); arrays in it are views into the buffer. */
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

/** Lowest and highest finite value of some arrays, widened where they are one; null where there is none. */
export function extent(arrays, pad = 0) {
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
  const margin = low === high ? Math.max(Math.abs(low) * 0.05, 0.5 * (pad || 1)) : (high - low) * pad;
  return [low - margin, high + margin];
}

/** Index of the value of rising `xs` that is nearest to `x`. */
export function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return Math.abs(xs[low] - x) <= Math.abs(xs[high] - x) ? low : high;
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
