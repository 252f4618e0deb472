// Live curves of training runs. Python sends panels of thinned series (float32 bytes) and one line of progress per run, which
// this file draws.

import { alike, axes, clamp, duration, extent, floats, follow, format, html, inFrames, nearest } from "./shared.js";
import { colourOf, glyph, stroke, symbol } from "./series_glyph.js";
import { onceShown, onWidth, panel, put, rootOf, svg, takeKey, unpacked } from "./shared.js";

const AXES = { height: 170, margin: { left: 48, right: 10, top: 10, bottom: 34 }, count: 4 };
const X_AXES = { step: "steps", tokens: "tokens", seconds: "time" };
const ENDED_BADLY = new Set(["failed", "killed", "unreadable"]);

// -- shapes -----------------------------------------------------------------------------------------------------------

/** SVG path through the finite points, with a gap where a value is not finite. */
export function linePath(xs, ys, sx, sy) {
  let path = "";
  xs.forEach((x, i) => {
    if (!Number.isFinite(ys[i])) return;
    path += `${Number.isFinite(ys[i - 1]) ? "L" : "M"}${sx(x).toFixed(1)} ${sy(ys[i]).toFixed(1)}`;
  });
  return path;
}

export function bandPath(xs, low, high, sx, sy) {
  const kept = [...xs.keys()].filter((i) => Number.isFinite(low[i]) && Number.isFinite(high[i]));
  if (kept.length < 2) return "";
  const point = (values) => (i) => `${sx(xs[i]).toFixed(1)} ${sy(values[i]).toFixed(1)}`;
  return `M${kept.map(point(high)).join("L")}L${kept.reverse().map(point(low)).join("L")}Z`;
}

/** Units of the time axis, for axes that end after this number of seconds. */
const TIMES = [
  { seconds: 10_800, one: 3600, name: "h" },
  { seconds: 240, one: 60, name: "min" },
  { seconds: -Infinity, one: 1, name: "s" },
];

/** Indices of the points that have a mark: all, or about five, from the last one backwards. */
export function marked(length, all) {
  const step = all && length <= 40 ? 1 : Math.max(1, Math.ceil(length / 5));
  return Array.from({ length: Math.ceil(length / step) }, (_, i) => length - 1 - i * step);
}

// -- data -------------------------------------------------------------------------------------------------------------

function unpack(curves) {
  const coloured = (method) => [method.method, { ...method, colour: colourOf(method.look) }];
  const methods = new Map((curves.methods ?? []).map(coloured));
  const lineOf = ({ method, front, run, ...views }) => {
    const arrays = ["x", "y", "low", "high", "tokens", "seconds"].map((name) => [name, floats(views[name])]);
    return { method: methods.get(method), front, run, ...Object.fromEntries(arrays) };
  };
  return (curves.panels ?? []).map((panel) => ({ ...panel, axis: panel.of ?? "step", lines: panel.lines.map(lineOf) }));
}

/** Panels over `axis` where all their lines have it, else over what they had. The points of their runs then lie apart. */
export function along(panels, axis) {
  return panels.map((panel) => {
    if (axis === "step" || !panel.lines.every((line) => line[axis])) return panel;
    return { ...panel, axis, apart: true, lines: panel.lines.map((line) => ({ ...line, x: line[axis] })) };
  });
}

/** A place on an axis as text. */
const placeText = (axis, value) => (axis === "seconds" ? `after ${duration(value)}` : axis === "tokens" ? `${format(value)} tokens` : `${axis} ${format(value)}`);

/** All steps of some lines, ascending, each once. */
const stepsOf = (lines) => [...new Set(lines.flatMap(({ x }) => [...x]))].sort((a, b) => a - b);

/** The step of a method's lines that is nearest to `step` (null: the last); null if `step` is outside all lines. */
function readingStep(lines, step) {
  if (step === null) return Math.max(...lines.map(({ x }) => x.at(-1)));
  const steps = stepsOf(lines.filter(({ x }) => x[0] <= step && step <= x.at(-1)));
  return steps.length ? steps[nearest(steps, step)] : null;
}

/** The value of each line at its point nearest to `x` (null: at its last), without the lines that end before or begin after. */
const valuesNear = (lines, x) =>
  x === null
    ? lines.map(({ y }) => y.at(-1))
    : lines.filter((line) => line.x[0] <= x && x <= line.x.at(-1)).map((line) => line.y[nearest(line.x, x)]);

/**
 * The values of each method at the step nearest to `step` (null: at its last): the mean over its runs and, with several runs,
 * the lowest and highest, all with the same number of digits. All values are of one step; if only some of the runs have reached it, the text has their number.
 * Over tokens or time, runs have points at different places, and each gives its nearest one.
 */
export function readings(panel, step) {
  const found = [];
  for (const method of new Set(panel.lines.map((line) => line.method))) {
    const lines = panel.lines.filter((line) => line.method === method && line.x.length);
    const at = lines.length && !panel.apart ? readingStep(lines, step) : step;
    const values = panel.apart ? valuesNear(lines, step) : lines.filter(({ x }) => x.includes(at)).map(({ x, y }) => y[x.indexOf(at)]);
    if (!values.length) continue;
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const range = values.length > 1 ? [Math.min(...values), Math.max(...values)] : [];
    const some = values.length < lines.length ? `, ${values.length} of ${lines.length} seeds` : "";
    found.push({ method, numbers: [mean, ...range], some });
  }
  const text = alike(found.flatMap(({ numbers }) => numbers));
  return found.map(({ method, numbers: [mean, ...range], some }) => {
    const between = range.length ? ` (${range.map(text).join("–")})` : "";
    return { method, text: text(mean) + between + some };
  });
}

// -- drawing ----------------------------------------------------------------------------------------------------------

function drawPanel(view, panel, domain) {
  const values = panel.lines.flatMap(({ y, low, high }) => (low ? [y, low, high] : [y]));
  const range = extent(values, 0.06);
  if (range && extent(values, 0, false)[0] >= 0) range[0] = Math.max(range[0], 0); // no negative shares and losses
  view.svg.replaceChildren();
  view.cursor = null;
  if (!range || !domain) return;
  const unit = TIMES.find(({ seconds }) => domain[1] >= seconds); // only for time
  const [xs, label] = panel.axis === "seconds" ? [domain.map((x) => x / unit.one), `time (${unit.name})`] : [domain, panel.axis];
  const options = { ...AXES, xTicks: panel.axis === "seconds" ? () => true : Number.isInteger };
  const { sx: place, sy, inner } = axes(view.svg, options, xs, range, label);
  const sx = panel.axis === "seconds" ? (x) => place(x / unit.one) : place;
  const rank = ({ front, method }) => (front ? 100 : 0) - (method.width ?? 0); // wide lines below, the front one above all
  const inOrder = [...panel.lines].sort((one, other) => rank(one) - rank(other));
  for (const line of inOrder) drawLine(view.svg, panel, line, sx, sy);
  const cursor = svg("line", { class: "cursor", y1: inner.top, y2: inner.bottom }, view.svg);
  Object.assign(view, { sx, inner, domain, cursor, axis: panel.axis });
}

function drawCursor({ cursor, sx }, step) {
  if (!cursor) return;
  cursor.style.display = step === null ? "none" : "";
  if (step !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, sx(step).toFixed(1));
}

function drawLine(parent, panel, line, sx, sy) {
  const named = { class: line.front ? "front" : "", "data-line": line.method.method };
  const group = svg("g", { style: `color: ${line.method.colour}`, ...named }, parent);
  if (line.low) svg("path", { class: "band", d: bandPath(line.x, line.low, line.high, sx, sy) }, group);
  stroke(group, line.method, linePath(line.x, line.y, sx, sy));
  for (const i of marked(line.x.length, panel.marks).filter((i) => Number.isFinite(line.y[i]))) {
    symbol(group, line.method, { transform: `translate(${sx(line.x[i]).toFixed(1)} ${sy(line.y[i]).toFixed(1)})` });
  }
}

function drawReadings(view, panel, step) {
  view.unit.textContent = step === null ? panel.unit : `${placeText(panel.axis, step)}, ${panel.unit}`;
  view.values.replaceChildren();
  const texts = readings(panel, step).map(({ method, text }) => {
    const entry = html("span", "", view.values);
    glyph(entry, method);
    entry.append(`${method.label}: ${text}`);
    return entry.textContent;
  });
  const last = Math.max(0, ...panel.lines.map(({ x }) => x.at(-1) ?? 0));
  const aria = {
    label: `${panel.title}, ${panel.unit}, over ${X_AXES[panel.axis] ?? `${panel.axis}s`}; use the arrow keys to read values`,
    valuemin: 0,
    valuemax: last,
    valuenow: step ?? last,
    valuetext: `${placeText(panel.axis, step ?? last)}: ${texts.join("; ")}`,
  };
  for (const [name, value] of Object.entries(aria)) view.svg.setAttribute(`aria-${name}`, value);
}

function drawProgress(parent, runs) {
  parent.replaceChildren();
  for (const run of runs) {
    const row = html("div", "run", parent);
    html("span", { title: run.name }, row, run.label);
    html("span", ENDED_BADLY.has(run.state) ? "state bad" : "state", row, run.shown ?? run.state);
    html("progress", { max: run.steps || 1, value: run.step || 0, "aria-label": `${run.label}: steps done` }, row);
    const facts = [run.steps ? `step ${format(run.step)}/${format(run.steps)}` : "not started"];
    if (run.tokens_per_second) facts.push(`${Math.round(run.tokens_per_second).toLocaleString("en")} tokens/s`);
    if (Number.isFinite(run.seconds_left)) facts.push(`${duration(run.seconds_left)} left`);
    html("span", "", row, facts.join(" · "));
    if (run.failure ?? run.error) html("span", "error", row, run.failure ?? run.error);
    for (const text of [run.remark, run.note].filter(Boolean)) html("span", "warning", row, text);
  }
}

// -- the widget -------------------------------------------------------------------------------------------------------

function render({ model, el }) {
  const { root, error } = rootOf(el, "live-curves", "Live training curves");
  const progress = html("div", "runs", root);
  const announced = html("div", { class: "unseen", role: "status" }, root); // the states of the runs, not every step
  const note = html("div", "note", root);
  const choice = html("label", "axis", root, "x axis: ");
  const select = html("select", "", choice);
  for (const [value, text] of Object.entries(X_AXES)) html("option", { value }, select, text);
  const grid = html("div", "panels", root);
  const views = new Map();
  let curves = []; // the panels over their steps
  let panels = [];
  let step = null;
  let pointed = ""; // the axis that `step` is a place on
  let endWaiting = () => {};
  let stale = true; // the curves, not only the cursor

  const steps = (axis) => stepsOf(panels.filter((panel) => panel.axis === axis).flatMap(({ lines }) => lines));
  const schedule = inFrames(draw);
  const redraw = () => {
    stale = true;
    schedule();
  };
  const point = (to, on = "") => {
    [step, pointed] = [to, on];
    schedule();
  };

  function viewOf({ name, title, help }) {
    if (views.has(name)) return views.get(name);
    const drawing = { tabindex: 0, role: "slider", "data-panel": name, focusable: true };
    const view = { ...panel(grid, title, "", drawing, help), values: html("div", "values") };
    view.svg.before(view.values);
    view.svg.addEventListener("pointermove", (event) => hover(view, event));
    for (const leave of ["pointerleave", "blur"]) view.svg.addEventListener(leave, () => point(null));
    view.svg.addEventListener("keydown", (event) => onKey(view, event));
    views.set(name, view);
    return view;
  }

  function hover(view, event) {
    const all = steps(view.axis);
    if (!view.sx || !all.length) return;
    const x = event.clientX - view.svg.getBoundingClientRect().left;
    const share = (x - view.inner.left) / (view.inner.right - view.inner.left);
    point(all[nearest(all, view.domain[0] + share * (view.domain[1] - view.domain[0]))], view.axis);
  }

  function onKey(view, event) {
    const all = steps(view.axis);
    const at = step === null || pointed !== view.axis ? all.length - 1 : nearest(all, step);
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at + 10, PageDown: at - 10, Home: 0, End: all.length - 1 };
    if (event.key !== "Escape" && !(event.key in moves)) return;
    takeKey(event);
    if (event.key === "Escape") point(null);
    else if (all.length) point(all[clamp(moves[event.key], 0, all.length - 1)], view.axis);
  }

  function draw() {
    endWaiting();
    if (!root.clientWidth) {
      endWaiting = onceShown(root, draw); // hidden, as for a moment while JupyterLab changes its theme: no width to draw for
      return;
    }
    if (stale) drawAll();
    stale = false;
    for (const panel of panels) {
      const at = panel.axis === pointed ? step : null;
      drawCursor(views.get(panel.name), at);
      drawReadings(views.get(panel.name), panel, at);
    }
  }

  function drawAll() {
    for (const [name, view] of views) {
      if (panels.some((panel) => panel.name === name)) continue;
      view.figure.remove();
      views.delete(name);
    }
    const domains = new Map(); // one for each kind of axis, which its panels share
    for (const { axis } of panels) {
      domains.set(axis, extent(panels.filter((panel) => panel.axis === axis).flatMap(({ lines }) => lines.map(({ x }) => x))));
    }
    grid.classList.toggle("fitted", panels.some(({ lines }) => lines.some(({ front }) => front)));
    panels.forEach((panel, index) => {
      const view = viewOf(panel);
      const there = grid.children[index] ?? null; // a figure moves only if it must: it would lose the focus
      if (there !== view.figure) grid.insertBefore(view.figure, there);
    });
    for (const panel of panels) drawPanel(views.get(panel.name), panel, domains.get(panel.axis)); // once all are there, which have their widths
    note.textContent = panels.length ? "" : "No data yet. Curves appear after the first step.";
  }

  const onAxis = () => {
    const axis = model.get("axis") ?? "step";
    if (select.value !== axis) step = null;
    select.value = axis;
    const hidden = new Set(model.get("hidden"));
    const shown = ({ lines, ...panel }) => ({ ...panel, lines: lines.filter(({ run }) => !hidden.has(run)) });
    panels = along(curves, axis).map(shown).filter(({ lines }) => lines.length);
    redraw();
  };
  const onCurves = () => {
    curves = unpack(unpacked(model.get("curves")));
    choice.hidden = !curves.some(({ lines }) => lines.every(({ tokens }) => tokens));
    onAxis();
  };
  select.addEventListener("change", () => {
    step = null;
    put(model, "axis", select.value);
  });
  const onProgress = () => {
    const runs = model.get("progress");
    progress.hidden = model.get("listed") === false;
    drawProgress(progress, runs);
    const facts = ({ label, shown, state, failure, error, remark, note }) => [label, shown ?? state, failure ?? error, remark, note];
    const states = runs.map((run) => facts(run).filter(Boolean).join(": ")).join("; ");
    if (announced.textContent !== states) announced.textContent = states;
  };
  const listeners = { curves: onCurves, axis: onAxis, hidden: onAxis, progress: onProgress, listed: onProgress, error };
  return follow(model, listeners, onWidth(root, redraw), schedule.cancel, () => endWaiting());
}

export default { render };
