// The parts around the text of the token map: its controls, the legend of the scale, and the tooltip.

import { clamp, format, html, rootOf, ticks } from "./shared.js";
import { shareOf } from "./token_colours.js";
import { visibleText } from "./token_layout.js";

const HELP =
  "Arrows, Page Up/Down: move · Home/End: start/end of the line (with Ctrl: of the document) · Enter or click: select · n/p: next/previous highest value · " +
  "/: find · Shift or drag: highlight text · Ctrl+C: copy the highlighted text or the line · Esc: clear";

export function withUnit(metric, value) {
  if (value !== value) return "no value";
  if (Math.abs(value) === Infinity) return value > 0 ? "∞" : "−∞";
  return `${format(value).replace("-", "−")}${metric.unit ? ` ${metric.unit}` : ""}`;
}

/** All elements of the widget, by name. */
export function buildPanel(el) {
  const { root, error } = rootOf(el, "token-map", "Token map");
  const bar = html("div", "bar", root);
  const colour = html("label", "colour", bar, "Colour by ");
  const metric = html("select", "", colour);
  const legend = html("div", "legend", bar);
  const tools = html("div", "tools", bar);
  const highest = html("span", "group", tools);
  const press = (parent, text, label, title) =>
    html("button", { type: "button", "aria-label": label, title }, parent, text);
  const previous = press(highest, "prev", "Previous highest", "Previous highest value (p)");
  const next = press(highest, "next", "Next highest", "Next highest value (n)");
  html("span", "", highest, "highest");
  const search = html("span", "group", tools);
  const field = { type: "search", placeholder: "Find text", spellcheck: false, "aria-label": "Find text in the document" };
  const find = html("input", field, search);
  const back = press(search, "▲", "Previous match", "Previous match (Shift+Enter)");
  const forth = press(search, "▼", "Next match", "Next match (Enter)");
  const count = html("span", "count", search);
  const copy = press(tools, "Copy", "Copy", "Copy the highlighted text or the line (Ctrl+C)");
  const picture = press(tools, "PNG", "PNG", "Download the document and its colours as a picture");
  const frame = html("div", "frame", root);
  const scroller = html("div", "scroller", frame);
  const tall = html("div", "tall", scroller);
  const id = `token-map-help-${Math.random().toString(36).slice(2)}`;
  const described = { "aria-roledescription": "token map", "aria-describedby": id };
  const canvas = html("canvas", { class: "text", tabindex: 0, role: "application", ...described }, tall);
  const title = "The whole document: bars show means, ticks show maxima; click or drag to jump there";
  const minimap = html("canvas", { class: "minimap", "aria-hidden": true, title }, frame); // the keyboard has Page Up and Down
  const status = html("div", { class: "status", "aria-live": "polite" }, root);
  html("div", { class: "help", id }, root, HELP);
  const tip = html("div", { class: "tip", popover: "manual", "aria-hidden": true }, root); // above all; the status has its text
  const controls = { bar, colour, metric, legend, highest, previous, next, find, back, forth, count, copy, picture };
  return { root, error, ...controls, frame, scroller, tall, canvas, minimap, status, tip };
}

// -- legend -----------------------------------------------------------------------------------------------------------

const DIGIT = 6.5; // pixels of a character of a label, at most
const GAP = 5; // pixels between two labels, at least
const STRIP_WIDTH = 210;

/** Texts of values with as many digits as keep them apart on the scale, three at least. */
function scaleTexts({ low, high, log }, values) {
  for (let digits = 3; ; digits++) {
    const rounded = values.map((value) => Number(value.toPrecision(digits)));
    const exact = ([value, shown]) =>
      Math.abs(log ? Math.log(shown / value) : shown - value) <= 0.01 * Math.abs(log ? Math.log(high / low) : high - low);
    if (digits < 12 && !values.every((value, i) => exact([value, rounded[i]]))) continue;
    const text = (value) => (digits > 4 ? value.toLocaleString("en", { maximumSignificantDigits: digits }) : format(value));
    return rounded.map((value) => text(value).replace("-", "−"));
  }
}

/** Labels of the scale, [value, text]: its ends, and the round values that leave them room. */
export function scaleLabels(metric) {
  const { low, high } = metric;
  let between = metric.log ? [] : ticks(low, high, 4);
  for (let power = 1; metric.log && power <= high; power *= 10) between.push(power);
  between = between.filter((value) => shareOf(metric, value) > 0.18 && shareOf(metric, value) < 0.8);
  const texts = scaleTexts(metric, [low, ...between, high]);
  texts[0] = (metric.below ? "≤ " : "") + texts[0];
  texts.push((metric.above ? "≥ " : "") + texts.pop());
  const labels = [low, ...between, high].map((value, i) => [value, texts[i]]);
  const place = ([value]) => shareOf(metric, value) * STRIP_WIDTH;
  const apart = (one, other) => Math.abs(place(one) - place(other)) > (DIGIT * (one[1].length + other[1].length)) / 2 + GAP;
  const kept = labels.slice(0, 1);
  for (const label of labels.slice(1, -1)) if (apart(kept.at(-1), label) && apart(label, labels.at(-1))) kept.push(label);
  return [...kept, labels.at(-1)];
}

export function drawLegend(parent, metric, ramp, document) {
  parent.replaceChildren();
  if (!metric) return;
  const title = html("span", "title", parent, metric.title);
  if (metric.unit) html("span", "unit", title, ` ${metric.unit}`);
  const ends = [metric.below && "below", metric.above && "above"].filter(Boolean).join(" and ");
  const labels = scaleLabels(metric);
  const [low, high] = [labels[0], labels.at(-1)].map(([, text]) => text.replace(/^[≤≥] /, ""));
  const range = `${metric.title} from ${low} to ${high}${metric.unit && ` ${metric.unit}`}`;
  const label = range + (ends && `; values ${ends} this range have the colour of the nearest end`);
  const [below, above] = metric.ends ?? ["", ""];
  const strip = html("div", "ends", parent);
  if (below) html("span", "end", strip, below);
  const scale = html("div", { class: "scale", role: "img", title: label, "aria-label": label }, strip);
  const stops = Array.from({ length: 17 }, (_, i) => ramp.grounds[1 + Math.round((i / 16) * 254)]);
  html("div", { class: "strip", style: `background: linear-gradient(to right, ${stops.join(", ")})` }, scale);
  for (const [value, text] of labels) {
    html("span", { class: "tick", style: `left: ${(shareOf(metric, value) * 100).toFixed(1)}%` }, scale, text);
  }
  if (above) html("span", "end", strip, above);
  if (document.targets.length) html("span", "key target", parent, `◆ ${document.mark}`);
  if (document.chunk_borders.length) html("span", "key border", parent, "│1 chunk");
}

// -- tooltip ----------------------------------------------------------------------------------------------------------

/** Fills the tooltip of a token. `alternatives`: rows of [text, probability]; null until the answer has come. */
export function fillTip(tip, { token, total, text, metrics, chosen, target, alternatives }) {
  tip.replaceChildren();
  const head = html("div", "head", tip);
  html("code", "", head, text === "" ? "(part of the next character)" : visibleText(text, 60));
  html("span", "place", head, `${format(token)} of ${format(total)}`);
  if (target !== undefined) html("div", "target", tip, `◆ ${visibleText(target)}`);
  const table = html("table", "", tip);
  for (const metric of metrics) {
    const line = html("tr", metric === chosen ? "chosen" : "", table);
    html("th", { scope: "row" }, line, metric.title);
    html("td", "", line, withUnit(metric, metric.values[token]));
  }
  if (alternatives === null) html("div", "quiet", tip, "loading alternatives…");
  if (!alternatives?.length) return;
  html("div", "quiet", tip, "most likely tokens");
  const list = html("table", "", tip);
  for (const [other, probability] of alternatives) {
    const line = html("tr", other === text ? "chosen" : "", list);
    html("td", "text", line).append(html("code", "", null, visibleText(other, 30)), other === text ? " ✓" : "");
    html("span", { style: `width: ${Math.max(probability * 60, 1).toFixed(1)}px` }, html("td", "share", line));
    html("td", "", line, `${(probability * 100).toFixed(probability < 0.1 ? 2 : 1)} %`);
  }
}

/** Puts the tooltip below or above a box of the window, { left, top, bottom }, wherever it has room. */
export function placeTip(tip, box) {
  if (!tip.matches(":popover-open")) tip.showPopover();
  const [wide, high] = [tip.offsetWidth, tip.offsetHeight];
  const below = box.bottom + 8 + high <= innerHeight || box.top - 8 - high < 0;
  tip.style.left = `${clamp(box.left, 4, Math.max(innerWidth - wide - 8, 4))}px`;
  tip.style.top = `${below ? Math.min(box.bottom + 8, Math.max(innerHeight - high - 4, 4)) : box.top - 8 - high}px`;
}

export const hideTip = (tip) => tip.matches(":popover-open") && tip.hidePopover();
