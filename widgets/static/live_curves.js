// Live curves of training runs. Python sends panels of thinned series (float32 bytes) and a line of progress a run;
// this file only draws them. Text reaches the page through textContent alone.

import { axes, clamp, duration, extent, floats, follow, format, html, inFrames, nearest, rootOf, svg, takeKey, unpacked } from "./shared.js";

const AXES = { height: 170, margin: { left: 48, right: 10, top: 10, bottom: 34 }, count: 4, xTicks: Number.isInteger };
const ENDED_BADLY = new Set(["failed", "killed", "unreadable"]);

// -- shapes -----------------------------------------------------------------------------------------------------------

/** SVG path through the finite points; a gap where a value is not finite. */
export function linePath(xs, ys, sx, sy) {
  let path = "";
  let pen = "M";
  for (let i = 0; i < xs.length; i++) {
    if (!Number.isFinite(ys[i])) {
      pen = "M";
      continue;
    }
    path += `${pen}${sx(xs[i]).toFixed(1)} ${sy(ys[i]).toFixed(1)}`;
    pen = "L";
  }
  return path;
}

export function bandPath(xs, low, high, sx, sy) {
  const kept = [...xs.keys()].filter((i) => Number.isFinite(low[i]) && Number.isFinite(high[i]));
  if (kept.length < 2) return "";
  const point = (values) => (i) => `${sx(xs[i]).toFixed(1)} ${sy(values[i]).toFixed(1)}`;
  return `M${kept.map(point(high)).join("L")}L${kept.reverse().map(point(low)).join("L")}Z`;
}

/** Of a line, in px: what has the same colour differs in it. */
const DASHES = { solid: "", dash: "7 4", dot: "2 3", dashdot: "8 3 2 3" };

const SYMBOLS = {
  circle: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z",
  diamond: "M0 -4.6L4.6 0L0 4.6L-4.6 0Z",
  square: "M-3.4 -3.4H3.4V3.4H-3.4Z",
  "triangle-up": "M0 -4.4L4.2 3.2H-4.2Z",
  x: "M-3.6 -1.8L-1.8 -3.6L0 -1.8L1.8 -3.6L3.6 -1.8L1.8 0L3.6 1.8L1.8 3.6L0 1.8L-1.8 3.6L-3.6 1.8L-1.8 0Z",
};

/** Indices of the points that carry a mark: all, or about five and the last. */
export function marked(length, all) {
  const step = all && length <= 40 ? 1 : Math.max(1, Math.ceil(length / 5));
  const found = [];
  for (let i = length - 1; i >= 0; i -= step) found.push(i);
  return found;
}

// -- data -------------------------------------------------------------------------------------------------------------

function unpack(curves) {
  const methods = new Map((curves.methods ?? []).map((method) => [method.method, { ...method, colour: `var(--series-${method.look % 6})` }]));
  const panels = (curves.panels ?? []).map((panel) => ({
    ...panel,
    lines: panel.lines.map((line) => ({
      method: methods.get(line.method),
      x: floats(line.x),
      y: floats(line.y),
      low: floats(line.low),
      high: floats(line.high),
    })),
  }));
  return { methods, panels };
}

/** The step at which an method's lines are read: of those made the nearest to `step` (null: the last); null where none has been there. */
function readingStep(lines, step) {
  const ends = lines.map(({ x }) => [x[0], x[x.length - 1]]);
  if (step === null) return Math.max(...ends.map(([, last]) => last));
  const there = lines.filter((line, i) => ends[i][0] <= step && step <= ends[i][1]);
  const steps = [...new Set(there.flatMap(({ x }) => [...x]))].sort((a, b) => a - b);
  return steps.length ? steps[nearest(steps, step)] : null;
}

/**
 * What each method shows at the step nearest to `step` (null: at its last): the mean over its runs and, of several, lowest and
 * highest. All values are of one step; where only some of the runs have made it, how many.
 */
export function readings(panel, step) {
  const byMethod = new Map();
  for (const line of panel.lines) {
    if (!byMethod.has(line.method)) byMethod.set(line.method, []);
    if (line.x.length) byMethod.get(line.method).push(line);
  }
  const found = [];
  for (const [method, lines] of byMethod) {
    const at = lines.length ? readingStep(lines, step) : null;
    if (at === null) continue;
    const values = lines.filter(({ x }) => x.includes(at)).map(({ x, y }) => y[x.indexOf(at)]);
    const mean = format(values.reduce((sum, value) => sum + value, 0) / values.length);
    const range = values.length > 1 ? ` (${format(Math.min(...values))}–${format(Math.max(...values))})` : "";
    const some = values.length < lines.length ? `, ${values.length} of ${lines.length} seeds` : "";
    found.push({ method, text: mean + range + some });
  }
  return found;
}

// -- drawing ----------------------------------------------------------------------------------------------------------

function drawPanel(view, panel, domain) {
  const range = extent(panel.lines.flatMap((line) => (line.low ? [line.y, line.low, line.high] : [line.y])), 0.06);
  view.svg.replaceChildren();
  view.cursor = null;
  if (!range || !domain) return;
  const { sx, sy, inner } = axes(view.svg, AXES, domain, range, panel.of ?? "step");
  Object.assign(view, { sx, inner, domain });
  for (const line of panel.lines) drawLine(view.svg, panel, line, sx, sy);
  view.cursor = svg("line", { class: "cursor", y1: inner.top, y2: inner.bottom }, view.svg);
}

function hollow(method) {
  return (method.dash ?? "solid") !== "solid";
}

function drawCursor(view, step) {
  if (!view.cursor) return;
  view.cursor.style.display = step === null ? "none" : "";
  if (step === null) return;
  for (const end of ["x1", "x2"]) view.cursor.setAttribute(end, view.sx(step).toFixed(1));
}

function drawLine(parent, panel, line, sx, sy) {
  const group = svg("g", { style: `color: ${line.method.colour}` }, parent);
  if (line.low) svg("path", { class: "band", d: bandPath(line.x, line.low, line.high, sx, sy) }, group);
  svg("path", { class: "line", d: linePath(line.x, line.y, sx, sy), "stroke-dasharray": DASHES[line.method.dash] ?? "" }, group);
  for (const i of marked(line.x.length, panel.marks)) {
    if (!Number.isFinite(line.y[i])) continue;
    const at = `translate(${sx(line.x[i]).toFixed(1)} ${sy(line.y[i]).toFixed(1)})`;
    svg("path", { class: hollow(line.method) ? "mark hollow" : "mark", d: SYMBOLS[line.method.symbol], transform: at }, group);
  }
}

function drawReadings(view, panel, step) {
  const found = readings(panel, step);
  view.unit.textContent = step === null ? panel.unit : `${panel.of ?? "step"} ${format(step)}, ${panel.unit}`;
  view.values.replaceChildren();
  for (const { method, text } of found) {
    const entry = html("span", "", view.values);
    const glyph = svg("svg", { class: "glyph", viewBox: "-14 -6 28 12", style: `color: ${method.colour}`, "aria-hidden": "true" }, entry);
    svg("path", { class: "line", d: "M-14 0H14", "stroke-dasharray": DASHES[method.dash] ?? "" }, glyph);
    svg("path", { class: hollow(method) ? "mark hollow" : "mark", d: SYMBOLS[method.symbol] }, glyph);
    entry.append(`${method.label}: ${text}`);
  }
  const words = found.map(({ method, text }) => `${method.label}: ${text}`).join("; ");
  const last = Math.max(0, ...panel.lines.map((line) => line.x[line.x.length - 1] ?? 0));
  view.svg.setAttribute("aria-label", `${panel.title}, ${panel.unit}, over ${panel.of ?? "step"}s; use the arrow keys to read values`);
  view.svg.setAttribute("aria-valuemin", 0);
  view.svg.setAttribute("aria-valuemax", last);
  view.svg.setAttribute("aria-valuenow", step ?? last);
  view.svg.setAttribute("aria-valuetext", `${panel.of ?? "step"} ${step ?? last}: ${words}`);
}

function drawProgress(parent, runs) {
  parent.replaceChildren();
  for (const run of runs) {
    const row = html("div", "run", parent);
    html("span", "", row, run.label).title = run.name;
    html("span", ENDED_BADLY.has(run.state) ? "state bad" : "state", row, run.state);
    const bar = html("progress", "", row);
    bar.max = run.steps || 1;
    bar.value = run.step || 0;
    bar.setAttribute("aria-label", `${run.label}: steps done`);
    const facts = [run.steps ? `step ${format(run.step)}/${format(run.steps)}` : "not started"];
    if (run.tokens_per_second) facts.push(`${Math.round(run.tokens_per_second).toLocaleString("en")} tokens/s`);
    if (Number.isFinite(run.seconds_left)) facts.push(`${duration(run.seconds_left)} left`);
    html("span", "", row, facts.join(" · "));
    if (run.error) html("span", "error", row, run.error);
  }
}

// -- the widget -------------------------------------------------------------------------------------------------------

function render({ model, el }) {
  const { root, error } = rootOf(el, "live-curves", "Live training curves");
  const progress = html("div", "runs", root);
  const said = html("div", "unseen", root);
  said.setAttribute("role", "status"); // reads out what becomes of the runs, not every step
  const note = html("div", "note", root);
  const panels = html("div", "panels", root);
  const views = new Map();
  let data = unpack({});
  let step = null;
  let stale = true; // the curves, not only the cursor

  const steps = () => [...new Set(data.panels.flatMap((panel) => panel.lines.flatMap((line) => [...line.x])))].sort((a, b) => a - b);
  const { schedule, cancel } = inFrames(() => draw());
  const redraw = () => {
    stale = true;
    schedule();
  };
  const point = (to) => {
    step = to;
    schedule();
  };

  function viewOf(panel) {
    if (views.has(panel.name)) return views.get(panel.name);
    const figure = html("figure", "panel", panels);
    const title = html("div", "title", figure);
    html("span", "", title, panel.title);
    const view = { figure, unit: html("span", "unit", title), values: html("div", "values", figure) };
    view.svg = svg("svg", { tabindex: 0, role: "slider", "data-panel": panel.name, focusable: "true" }, figure);
    view.svg.addEventListener("pointermove", (event) => hover(view, event));
    view.svg.addEventListener("pointerleave", () => point(null));
    view.svg.addEventListener("blur", () => point(null));
    view.svg.addEventListener("keydown", onKey);
    views.set(panel.name, view);
    return view;
  }

  function hover(view, event) {
    const all = steps();
    if (!view.sx || !all.length) return;
    const x = event.clientX - view.svg.getBoundingClientRect().left;
    const share = (x - view.inner.left) / (view.inner.right - view.inner.left);
    point(all[nearest(all, view.domain[0] + share * (view.domain[1] - view.domain[0]))]);
  }

  function onKey(event) {
    const all = steps();
    const at = step === null ? all.length - 1 : nearest(all, step);
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at + 10, PageDown: at - 10, Home: 0, End: all.length - 1 };
    if (event.key !== "Escape" && !(event.key in moves)) return;
    takeKey(event);
    if (event.key === "Escape") point(null);
    else if (all.length) point(all[clamp(moves[event.key], 0, all.length - 1)]);
  }

  function draw() {
    if (stale) drawAll();
    stale = false;
    for (const panel of data.panels) {
      drawCursor(views.get(panel.name), step);
      drawReadings(views.get(panel.name), panel, step);
    }
  }

  function drawAll() {
    const names = new Set(data.panels.map((panel) => panel.name));
    for (const [name, view] of views) {
      if (names.has(name)) continue;
      view.figure.remove();
      views.delete(name);
    }
    const domain = extent(data.panels.flatMap((panel) => panel.lines.map((line) => line.x)));
    data.panels.forEach((panel, index) => {
      const view = viewOf(panel);
      const there = panels.children[index] ?? null; // moved only where it must: moving takes the focus away
      if (there !== view.figure) panels.insertBefore(view.figure, there);
      drawPanel(view, panel, domain);
    });
    note.textContent = data.panels.length ? "" : "No data yet. Curves appear after the first step.";
  }

  const onCurves = () => {
    data = unpack(unpacked(model.get("curves")));
    redraw();
  };
  const onProgress = () => {
    const runs = model.get("progress");
    drawProgress(progress, runs);
    const states = runs.map(({ label, state, error }) => [label, state, error].filter(Boolean).join(": ")).join("; ");
    if (said.textContent !== states) said.textContent = states;
  };
  const onError = () => {
    error.textContent = model.get("error");
  };
  const stop = follow(model, { curves: onCurves, progress: onProgress, error: onError });
  const resized = new ResizeObserver(redraw);
  resized.observe(root);

  return () => {
    cancel();
    resized.disconnect();
    stop();
  };
}

export default { render };
