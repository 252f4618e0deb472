// The spread of rewards, and scatters of them against other things. All numbers are of the selected positions; rollouts of clicked
// ones are drawn apart, and what the list of rollouts leaves out is pale.

import { axes, extent, floats, follow, format, html, inFrames, onWidth, rootOf, svg, unpacked } from "./shared.js";

const AXES = { height: 150, margin: { left: 42, right: 10, top: 8, bottom: 32 }, count: 3 };
const KINDS = ["left-out", "shown", "clicked"]; // drawn one over the other

function frame(parent, title, note, label) {
  const figure = html("figure", "panel", parent);
  const heading = html("figcaption", "title", figure);
  html("span", "", heading, title);
  html("span", "unit", heading, note);
  return svg("svg", { role: "img", "aria-label": label }, figure);
}

/** Of each rollout how it is drawn: `left-out` by the list's filters, `shown`, `clicked`, or null for a clicked one that is left out. */
export function kindsOf(apart, passing) {
  const whole = passing.byteLength === apart.byteLength ? passing : null; // else it is of other rollouts
  return Array.from({ length: apart.byteLength }, (_, row) => {
    const shown = whole === null || whole.getUint8(row) === 1;
    if (apart.getUint8(row)) return shown ? "clicked" : null;
    return shown ? "shown" : "left-out";
  });
}

/** How many of the values of some rollouts fall into each bin; the highest edge belongs to the last bin, as numpy has it. */
export function counted(values, edges, takes) {
  const counts = new Array(edges.length - 1).fill(0);
  values.forEach((value, row) => {
    if (!takes(row) || !(value >= edges[0] && value <= edges[edges.length - 1])) return;
    let bin = edges.length - 2;
    while (bin > 0 && value < edges[bin]) bin--;
    counts[bin]++;
  });
  return counts;
}

function histogram(parent, facts, y, kinds) {
  const note = `${format(facts.mean)} ± ${format(facts.std)}`;
  const label = `Distribution of ${facts.rollouts} rewards: mean ${format(facts.mean)}, standard deviation ${format(facts.std)}`;
  const drawing = frame(parent, `${facts.reward} reward`, note, label);
  const { edges } = facts;
  const bars = [
    ["left-out", facts.counts],
    ["shown", counted(y, edges, (row) => kinds[row] === "shown")],
  ];
  const clicked = y.filter((_, row) => kinds[row] === "clicked"); // a mark each: the bins are those of the selected positions
  const xs = extent([[edges[0], edges[edges.length - 1]], clicked], 0.02);
  const { sx, sy, inner } = axes(drawing, AXES, xs, [0, Math.max(...bars.flatMap(([, numbers]) => numbers)) * 1.05], "reward");
  for (const [kind, numbers] of bars) {
    numbers.forEach((count, i) => {
      if (!count) return;
      const x = sx(edges[i]);
      const bar = { class: `bar ${kind}`, x, y: sy(count), width: Math.max(sx(edges[i + 1]) - x - 1, 1), height: inner.bottom - sy(count) };
      svg("title", {}, svg("rect", bar, drawing), `${format(edges[i])} to ${format(edges[i + 1])}: ${count}`);
    });
  }
  for (const value of clicked) {
    svg("line", { class: "rug clicked", x1: sx(value), x2: sx(value), y1: inner.bottom - 12, y2: inner.bottom }, drawing);
  }
}

function scatter(parent, facts, panel, y, kinds) {
  const x = floats(panel.x);
  const r = panel.r === null ? "constant" : `r = ${panel.r.toFixed(2)}`;
  const drawing = frame(parent, `Reward vs ${panel.title}`, r, `${facts.reward} reward against ${panel.title}: ${r}`);
  const [xs, ys] = [extent([x], 0.04), extent([y], 0.06)];
  if (!xs || !ys) return;
  const { sx, sy } = axes(drawing, AXES, xs, ys, panel.unit);
  for (const kind of KINDS) {
    let path = "";
    for (let i = 0; i < x.length; i++) {
      const row = i * facts.stride;
      if (kinds[row] === kind && Number.isFinite(x[i]) && Number.isFinite(y[row])) path += `M${sx(x[i]).toFixed(1)} ${sy(y[row]).toFixed(1)}h0`;
    }
    if (path) svg("path", { class: `dots ${kind}`, d: path }, drawing);
  }
}

/** What the numbers are of, what is pale, and what is apart. */
export function sentences(facts, kinds) {
  const many = (count, word) => `${format(count)} ${word}${count === 1 ? "" : "s"}`;
  const where = facts.positions ? ` at ${many(facts.positions, "sampled position")}` : "";
  const shown = kinds.filter((kind) => kind === "shown").length;
  const apart = kinds.filter((kind) => kind === "clicked").length;
  const found = [`Statistics over ${many(facts.rollouts, "rollout")}${where}.`];
  if (shown < facts.rollouts) found.push(`Pale: ${many(facts.rollouts - shown, "rollout")} hidden by the list's filters.`);
  if (apart) found.push(`Orange: ${many(apart, "rollout")} at clicked positions, excluded from the statistics.`);
  return found.join(" ");
}

function render({ model, el }) {
  const { root } = rootOf(el, "reward-summary", "Rewards");
  const { schedule, cancel } = inFrames(() => {
    root.replaceChildren();
    const facts = unpacked(model.get("summary"));
    if (!facts.rollouts) {
      html("div", "note", root, "No rollouts yet.");
      return;
    }
    const y = floats(facts.y);
    const kinds = kindsOf(facts.apart, model.get("passing"));
    html("div", "note", root, sentences(facts, kinds));
    const panels = html("div", "panels", root);
    histogram(panels, facts, y, kinds);
    for (const panel of facts.panels) scatter(panels, facts, panel, y, kinds);
  });
  const stops = [follow(model, { summary: schedule, passing: schedule }), onWidth(root, schedule), cancel];
  return () => stops.forEach((stop) => stop());
}

export default { render };
