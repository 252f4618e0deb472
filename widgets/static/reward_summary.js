// The distribution of rewards, and scatter plots of rewards. All numbers describe the selected positions; rollouts at clicked
// positions have another colour, and rollouts that the list leaves out are pale.

import { saveFigures } from "./download.js";
import { axes, button, extent, floats, follow, format, html, inFrames, lastAtMost, onWidth, panel, quantity, rootOf, svg, unpacked } from "./shared.js";

const AXES = { height: 150, margin: { left: 42, right: 10, top: 8, bottom: 32 }, count: 3 };
const KINDS = ["left-out", "shown", "clicked"]; // in the order of drawing

const chart = (parent, title, note, label) => panel(parent, title, note, { role: "img", "aria-label": label }).svg;

/** How each rollout is drawn: `left-out` by the list's filters, `shown`, `clicked`, or null if clicked and left out. */
export function kindsOf(apart, passing) {
  const filtered = passing.byteLength === apart.byteLength; // else `passing` belongs to other rollouts
  return Array.from({ length: apart.byteLength }, (_, row) => {
    const passes = !filtered || passing.getUint8(row) === 1;
    if (apart.getUint8(row)) return passes ? "clicked" : null;
    return passes ? "shown" : "left-out";
  });
}

/** Number of values per bin; the highest edge belongs to the last bin, as in numpy. */
export function counted(values, edges, takes) {
  const counts = new Array(edges.length - 1).fill(0);
  values.forEach((value, row) => {
    const inside = takes(row) && value >= edges[0] && value <= edges.at(-1);
    if (inside) counts[Math.min(lastAtMost(edges, value), counts.length - 1)]++;
  });
  return counts;
}

function drawHistogram(parent, facts, y, kinds) {
  const note = `${format(facts.mean)} ± ${format(facts.std)}`;
  const label = `Distribution of ${facts.rollouts} rewards: mean ${format(facts.mean)}, standard deviation ${format(facts.std)}`;
  const drawing = chart(parent, `${facts.reward} reward`, note, label);
  const { edges } = facts;
  const bars = { "left-out": facts.counts, shown: counted(y, edges, (row) => kinds[row] === "shown") };
  const clicked = y.filter((_, row) => kinds[row] === "clicked"); // a mark each: the bins are those of the selected positions
  const xs = extent([[edges[0], edges.at(-1)], clicked], 0.02);
  const { sx, sy, inner } = axes(drawing, AXES, xs, [0, Math.max(...Object.values(bars).flat()) * 1.05], "reward");
  for (const [kind, numbers] of Object.entries(bars)) {
    numbers.forEach((count, i) => {
      if (!count) return;
      const [left, top] = [sx(edges[i]), sy(count)];
      const size = { width: Math.max(sx(edges[i + 1]) - left - 1, 1), height: inner.bottom - top };
      const bar = svg("rect", { class: `bar ${kind}`, x: left, y: top, ...size }, drawing);
      svg("title", {}, bar, `${format(edges[i])} to ${format(edges[i + 1])}: ${count}`);
    });
  }
  for (const value of clicked) {
    svg("line", { class: "rug clicked", x1: sx(value), x2: sx(value), y1: inner.bottom - 12, y2: inner.bottom }, drawing);
  }
}

function drawScatter(parent, facts, scatter, y, kinds) {
  const x = floats(scatter.x);
  const r = scatter.r === null ? "constant" : `r = ${scatter.r.toFixed(2)}`;
  const drawing = chart(parent, `Reward vs ${scatter.title}`, r, `${facts.reward} reward against ${scatter.title}: ${r}`);
  const [xs, ys] = [extent([x], 0.04), extent([y], 0.06)];
  if (!xs || !ys) return;
  const { sx, sy } = axes(drawing, AXES, xs, ys, scatter.unit);
  const paths = Object.fromEntries(KINDS.map((kind) => [kind, ""]));
  x.forEach((value, i) => {
    const row = i * facts.stride;
    if (!kinds[row] || !Number.isFinite(value) || !Number.isFinite(y[row])) return;
    paths[kinds[row]] += `M${sx(value).toFixed(1)} ${sy(y[row]).toFixed(1)}h0`;
  });
  for (const [kind, d] of Object.entries(paths)) if (d) svg("path", { class: `dots ${kind}`, d }, drawing);
}

/** Which rollouts the statistics cover, which are pale, and which are excluded. */
export function sentences(facts, kinds) {
  const number = (kind) => kinds.filter((other) => other === kind).length;
  const hidden = facts.rollouts - number("shown");
  const where = facts.positions ? ` at ${quantity(facts.positions, "sampled position")}` : "";
  const found = [`Statistics over ${quantity(facts.rollouts, "rollout")}${where}.`];
  if (hidden) found.push(`Pale: ${quantity(hidden, "rollout")} hidden by the list's filters.`);
  const clicked = quantity(number("clicked"), "rollout");
  if (number("clicked")) found.push(`Orange: ${clicked} at clicked positions, excluded from the statistics.`);
  return found.join(" ");
}

function render({ model, el }) {
  const { root } = rootOf(el, "reward-summary", "Rewards");
  const schedule = inFrames(() => {
    root.replaceChildren();
    const facts = unpacked(model.get("summary"));
    if (!facts.rollouts) return html("div", "note", root, "No rollouts yet.");
    const y = floats(facts.y);
    const kinds = kindsOf(facts.apart, model.get("passing"));
    const top = html("div", "top", root);
    html("div", "note", top, sentences(facts, kinds));
    button(top, "PNG", () => saveFigures(panels, "rewards.png"), { title: "Download the figures as a picture" });
    const panels = html("div", "panels", root);
    drawHistogram(panels, facts, y, kinds);
    for (const scatter of facts.panels) drawScatter(panels, facts, scatter, y, kinds);
  });
  return follow(model, { summary: schedule, passing: schedule }, onWidth(root, schedule), schedule.cancel);
}

export default { render };
