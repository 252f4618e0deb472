// What stands around the text of the token map: its controls, the scale's legend, and the tooltip.

import { button, format, html, rootOf, ticks } from "./shared.js";
import { shareOf } from "./token_colours.js";
import { visibleText } from "./token_layout.js";

const HELP =
  "Arrows, Page Up/Down: move · Home/End: ends of the line, with Ctrl of the document · Enter or click: select · n/p: next/previous highest · " +
  "/: find · Shift or drag: mark text · Ctrl+C: copy the marked text or the line · Esc: clear";

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
  const previous = button(highest, "▲", null, { label: "Previous highest", title: "Previous highest value (p)" });
  html("span", "", highest, "highest");
  const next = button(highest, "▼", null, { label: "Next highest", title: "Next highest value (n)" });
  const search = html("span", "group", tools);
  const find = html("input", "", search);
  Object.assign(find, { type: "search", placeholder: "Find text", spellcheck: false });
  find.setAttribute("aria-label", "Find text in the document");
  const back = button(search, "▲", null, { label: "Previous match", title: "Previous match (Shift+Enter)" });
  const forth = button(search, "▼", null, { label: "Next match", title: "Next match (Enter)" });
  const count = html("span", "count", search);
  const copy = button(tools, "Copy", null, { label: "Copy", title: "Copy the marked text or the line (Ctrl+C)" });
  const frame = html("div", "frame", root);
  const scroller = html("div", "scroller", frame);
  const tall = html("div", "tall", scroller);
  const canvas = html("canvas", "text", tall);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-roledescription", "token map");
  const minimap = html("canvas", "minimap", frame);
  minimap.setAttribute("aria-hidden", "true"); // the keyboard has Page Up and Down for it
  minimap.title = "The whole document: bars show means, ticks show maxima; click or drag to jump there";
  const status = html("div", "status", root);
  status.setAttribute("aria-live", "polite");
  const help = html("div", "help", root, HELP);
  help.id = `token-map-help-${Math.random().toString(36).slice(2)}`;
  canvas.setAttribute("aria-describedby", help.id);
  const tip = html("div", "tip", root);
  tip.popover = "manual"; // above all else of the page, whatever clips the output
  tip.setAttribute("aria-hidden", "true"); // the status line says it
  return { root, error, bar, colour, metric, legend, highest, previous, next, find, back, forth, count, copy, frame, scroller, tall, canvas, minimap, status, tip };
}

// -- legend -----------------------------------------------------------------------------------------------------------

/** What the scale is labelled with: [value, text], its ends and the round values that leave them room. */
export function scaleLabels(metric) {
  const { low, high } = metric;
  let between = metric.log ? [] : ticks(low, high, 4);
  for (let power = 1; metric.log && power <= high; power *= 10) between.push(power);
  between = between.filter((value) => shareOf(metric, value) > 0.18 && shareOf(metric, value) < 0.8);
  const text = (value) => format(Number(value.toPrecision(3))).replace("-", "−");
  const ends = [[low, (metric.below ? "≤ " : "") + text(low)], [high, (metric.above ? "≥ " : "") + text(high)]];
  return [ends[0], ...between.map((value) => [value, text(value)]), ends[1]];
}

export function drawLegend(parent, metric, ramp, document) {
  parent.replaceChildren();
  if (!metric) return;
  const title = html("span", "title", parent, metric.title);
  if (metric.unit) html("span", "unit", title, ` ${metric.unit}`);
  const scale = html("div", "scale", parent);
  const strip = html("div", "strip", scale);
  const stops = Array.from({ length: 17 }, (_, i) => ramp.grounds[1 + Math.round((i / 16) * 254)]);
  strip.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  const beyond = [metric.below && "below", metric.above && "above"].filter(Boolean);
  for (const [value, text] of scaleLabels(metric)) {
    const tick = html("span", "tick", scale, text);
    tick.style.left = `${(shareOf(metric, value) * 100).toFixed(1)}%`;
  }
  const range = `from ${withUnit(metric, metric.low)} to ${withUnit(metric, metric.high)}`;
  scale.title = `${metric.title} ${range}${beyond.length ? `; values ${beyond.join(" and ")} have the colour of that end` : ""}`;
  scale.setAttribute("role", "img");
  scale.setAttribute("aria-label", scale.title);
  if (document.targets.length) html("span", "key target", parent, "◆ sampled position");
  if (document.chunk_borders.length) html("span", "key border", parent, "│1 chunk");
}

// -- tooltip ----------------------------------------------------------------------------------------------------------

function row(table, name, value, className = "") {
  const line = html("tr", className, table);
  html("th", "", line, name).scope = "row";
  html("td", "", line, value);
}

/** Fill the tooltip with what is known of a token. `alternatives`: rows of [text, probability]; null while they are awaited. */
export function fillTip(tip, { token, total, text, metrics, chosen, target, alternatives, waiting }) {
  tip.replaceChildren();
  const head = html("div", "head", tip);
  html("code", "", head, text === "" ? "(part of the next character)" : visibleText(text, 60));
  html("span", "place", head, `${format(token)} of ${format(total)}`);
  if (target !== undefined) html("div", "target", tip, `◆ ${visibleText(target)}`);
  const table = html("table", "", tip);
  for (const metric of metrics) row(table, metric.title, withUnit(metric, metric.values[token]), metric === chosen ? "chosen" : "");
  if (waiting) html("div", "quiet", tip, "loading alternatives…");
  if (!alternatives?.length) return;
  html("div", "quiet", tip, "most likely tokens");
  const list = html("table", "", tip);
  for (const [other, probability] of alternatives) {
    const line = html("tr", other === text ? "chosen" : "", list);
    html("td", "text", line).append(html("code", "", null, visibleText(other, 30)), other === text ? " ✓" : "");
    const bar = html("td", "share", line);
    html("span", "", bar).style.width = `${Math.max(probability * 60, 1).toFixed(1)}px`;
    html("td", "", line, `${(probability * 100).toFixed(probability < 0.1 ? 2 : 1)} %`);
  }
}

/** Put the tooltip beside a box of the page ({ left, right, top, bottom } in the window), where there is room. */
export function placeTip(tip, box) {
  if (!tip.matches(":popover-open")) tip.showPopover?.();
  const [wide, high] = [tip.offsetWidth, tip.offsetHeight];
  const below = box.bottom + 8 + high <= innerHeight || box.top - 8 - high < 0;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - wide - 8))}px`;
  tip.style.top = `${below ? Math.min(box.bottom + 8, Math.max(innerHeight - high - 4, 4)) : box.top - 8 - high}px`;
}

export function hideTip(tip) {
  if (tip.matches(":popover-open")) tip.hidePopover();
}
