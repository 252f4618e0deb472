// The spread of rewards, and scatters of them against other things.

import { extent, floats, format, html, svg, ticks } from "./shared.js";

const HEIGHT = 150;
const MARGIN = { left: 40, right: 10, top: 8, bottom: 32 };

function frame(parent, title, note, label) {
  const figure = html("figure", "panel", parent);
  const heading = html("figcaption", "title", figure);
  html("span", "", heading, title);
  html("span", "unit", heading, note);
  const drawing = svg("svg", { role: "img", "aria-label": label }, figure);
  return { drawing, width: Math.max(drawing.clientWidth || 240, 140) };
}

function axes({ drawing, width }, xs, ys, xUnit) {
  drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const [left, right, top, bottom] = [MARGIN.left, width - MARGIN.right, MARGIN.top, HEIGHT - MARGIN.bottom];
  const sx = (x) => left + ((x - xs[0]) / (xs[1] - xs[0])) * (right - left);
  const sy = (y) => bottom - ((y - ys[0]) / (ys[1] - ys[0])) * (bottom - top);
  for (const tick of ticks(ys[0], ys[1], 3)) {
    svg("line", { class: "grid", x1: left, x2: right, y1: sy(tick), y2: sy(tick) }, drawing);
    svg("text", { x: left - 5, y: sy(tick) + 4, "text-anchor": "end" }, drawing, format(tick));
  }
  for (const tick of ticks(xs[0], xs[1], 3)) {
    svg("text", { x: sx(tick), y: bottom + 14, "text-anchor": "middle" }, drawing, format(tick));
  }
  svg("text", { x: (left + right) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, drawing, xUnit);
  return { sx, sy, bottom };
}

function histogram(parent, facts) {
  const note = `${format(facts.mean)} ± ${format(facts.std)}`;
  const label = `Distribution of ${facts.rollouts} rewards: mean ${format(facts.mean)}, standard deviation ${format(facts.std)}`;
  const view = frame(parent, `${facts.reward} reward`, note, label);
  const { edges, counts } = facts;
  const xs = extent([[edges[0], edges[edges.length - 1]]], 0.02);
  const { sx, sy, bottom } = axes(view, xs, [0, Math.max(...counts) * 1.05], "reward");
  counts.forEach((count, i) => {
    const x = sx(edges[i]);
    const bar = { class: "bar", x, y: sy(count), width: Math.max(sx(edges[i + 1]) - x - 1, 1), height: bottom - sy(count) };
    svg("title", {}, svg("rect", bar, view.drawing), `${format(edges[i])} to ${format(edges[i + 1])}: ${count}`);
  });
}

function scatter(parent, facts, panel, y) {
  const x = floats(panel.x);
  const r = panel.r === null ? "does not vary" : `r = ${panel.r.toFixed(2)}`;
  const view = frame(parent, `with ${panel.title}`, r, `${facts.reward} reward against ${panel.title}: ${r}`);
  const [xs, ys] = [extent([x], 0.04), extent([y], 0.06)];
  if (!xs || !ys) return;
  const { sx, sy } = axes(view, xs, ys, panel.unit);
  let path = "";
  for (let i = 0; i < x.length; i++) {
    if (Number.isFinite(x[i]) && Number.isFinite(y[i])) path += `M${sx(x[i]).toFixed(1)} ${sy(y[i]).toFixed(1)}h0`;
  }
  svg("path", { class: "dots", d: path }, view.drawing);
}

function render({ model, el }) {
  const root = html("div", "refine-lab reward-summary", el);
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Rewards");
  let pending = 0;
  const draw = () => {
    pending = 0;
    root.replaceChildren();
    const facts = model.get("summary");
    if (!facts.rollouts) {
      html("div", "note", root, "No rollouts yet.");
      return;
    }
    const panels = html("div", "panels", root);
    const y = floats(facts.y);
    histogram(panels, facts);
    for (const panel of facts.panels) scatter(panels, facts, panel, y);
  };
  const schedule = () => {
    pending ||= requestAnimationFrame(draw);
  };
  model.on("change:summary", schedule);
  let width = 0;
  const resized = new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return; // drawing changes the height alone
    width = entry.contentRect.width;
    schedule();
  });
  resized.observe(root);
  draw();
  return () => {
    cancelAnimationFrame(pending);
    resized.disconnect();
    model.off("change:summary", schedule);
  };
}

export default { render };
