// Colours of values: scales of even steps in lightness, and for each colour an ink that is readable on it.

import { clamp } from "./shared.js";

const RAMPS = {
  light: {
    sequential: ["#f6f1e6", "#fbd9a2", "#f5a35b", "#dc5f50", "#9b2b63", "#4a1259"],
    diverging: ["#0b4a8f", "#5d9fd6", "#c9dff0", "#f4f2ef", "#f6d6b5", "#dd8a3c", "#8f3d00"],
  },
  dark: {
    sequential: ["#211d2b", "#45205f", "#8a2d68", "#cf5150", "#f4994a", "#fbe9a6"],
    diverging: ["#86c8ff", "#2f78b8", "#173a5a", "#242326", "#55310f", "#b5651d", "#ffb76b"],
  },
};
const READABLE = 4.5; // contrast of text, by WCAG

// -- colour -----------------------------------------------------------------------------------------------------------

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255);
const byte = (value) => Math.round(clamp(value, 0, 1) * 255).toString(16).padStart(2, "0");
const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
const companded = (value) => (value <= 0.0031308 ? 12.92 * value : 1.055 * Math.max(value, 0) ** (1 / 2.4) - 0.055);

function oklab(hex) {
  const [r, g, b] = rgb(hex).map(linear);
  const l = Math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b);
  const m = Math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b);
  const s = Math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b);
  return [
    0.2104542553 * l + 0.793617785 * m - 0.0040720468 * s,
    1.9779984951 * l - 2.428592205 * m + 0.4505937099 * s,
    0.0259040371 * l + 0.7827717662 * m - 0.808675766 * s,
  ];
}

function fromOklab([light, a, b]) {
  const l = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (light - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const channels = [
    companded(4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s),
    companded(-1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s),
    companded(-0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s),
  ];
  return `#${channels.map(byte).join("")}`;
}

/** A mixture of two colours, even to the eye; `share` is that of the second. */
export function mix(one, other, share) {
  const [first, second] = [oklab(one), oklab(other)];
  return fromOklab(first.map((value, i) => value + share * (second[i] - value)));
}

function luminance(hex) {
  const [r, g, b] = rgb(hex).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

export function contrast(one, other) {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

export const isDark = (hex) => luminance(hex) < 0.18;

/** Black or white, whichever has more contrast with the ground; that is always enough to read. */
const inkOn = (ground) => (contrast(ground, "#000000") >= contrast(ground, "#ffffff") ? "#000000" : "#ffffff");

/** The faintest shade of `ink` that is still readable on `ground`. */
export function faintOn(ground, ink) {
  for (let share = 0.5; share > 0; share -= 0.125) {
    const shade = mix(ink, ground, share);
    if (contrast(shade, ground) >= READABLE) return shade;
  }
  return ink;
}

const ramps = new Map();

/** The same colours without those near the page's ground, for the bars drawn on it. */
function forBars(grounds, diverging) {
  return grounds.map((_, level) => {
    const share = Math.max(level - 1, 0) / 254;
    const kept = diverging ? (share < 0.5 ? share * 0.7 : 1 - (1 - share) * 0.7) : 0.3 + 0.7 * share;
    return grounds[1 + Math.round(kept * 254)];
  });
}

/** 256 colours: { grounds, inks, faints, profile }. Level 0 stands for tokens without a value and has no colour. */
export function rampOf(dark, diverging) {
  const stops = RAMPS[dark ? "dark" : "light"][diverging ? "diverging" : "sequential"];
  if (!ramps.has(stops)) {
    const grounds = [null];
    for (let level = 1; level < 256; level++) {
      const at = ((level - 1) / 254) * (stops.length - 1);
      const stop = Math.min(Math.floor(at), stops.length - 2);
      grounds.push(mix(stops[stop], stops[stop + 1], at - stop));
    }
    const inks = grounds.map((ground) => ground && inkOn(ground));
    const faints = grounds.map((ground, level) => ground && faintOn(ground, inks[level]));
    ramps.set(stops, { grounds, inks, faints, profile: forBars(grounds, diverging) });
  }
  return ramps.get(stops);
}

// -- scales -----------------------------------------------------------------------------------------------------------

/** From 0 at the low end of the metric's scale to 1 at the high end, 0.5 at 0 of a diverging one; NaN stays NaN. */
export function shareOf(metric, value) {
  const { low, high } = metric;
  let share = (value - low) / (high - low);
  if (metric.diverging) share = value < 0 ? 0.5 - (0.5 * value) / low : 0.5 + (0.5 * value) / high;
  if (metric.log) share = value > 0 ? Math.log(value / low) / Math.log(high / low) : value <= 0 ? 0 : NaN;
  return clamp(share, 0, 1);
}

/** Level 1 to 255 of every value, 0 for NaN, which a byte holds as 0. */
export const levelsOf = (metric) =>
  new Uint8Array(metric.values.length).map((_, i) => 1 + Math.round(shareOf(metric, metric.values[i]) * 254));

/** The `count` tokens of the highest values (of a diverging metric: farthest from 0), the highest first. */
export function highestTokens(metric, count = 50) {
  if (!metric) return [];
  const size = metric.diverging ? Math.abs : (value) => value;
  const tokens = [...metric.values.keys()].filter((token) => !Number.isNaN(metric.values[token]));
  return tokens.sort((a, b) => size(metric.values[b]) - size(metric.values[a]) || a - b).slice(0, count);
}
