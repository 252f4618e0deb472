// The result on the held-out remainder: one sentence, and a drawing of the interval of the change beside 0.

import { extent, follow, format, html, rootOf, svg, ticks } from "./shared.js";

const [WIDTH, HEIGHT, EDGE, MIDDLE] = [320, 58, 26, 16]; // of the drawing, in px; EDGE is its left and right margin

function drawInterval(drawing, [low, value, high]) {
  drawing.replaceChildren();
  const [first, last] = extent([[low, high, 0]], 0.08);
  const sx = (x) => EDGE + ((x - first) / (last - first)) * (WIDTH - 2 * EDGE);
  for (const tick of ticks(first, last, 3)) {
    svg("line", { class: tick === 0 ? "zero" : "grid", x1: sx(tick), x2: sx(tick), y1: 2, y2: 30 }, drawing);
    svg("text", { x: sx(tick), y: 43, "text-anchor": "middle" }, drawing, format(tick));
  }
  svg("text", { x: WIDTH / 2, y: 56, "text-anchor": "middle" }, drawing, "change in nats per token; below 0 is better");
  svg("line", { class: "interval", x1: sx(low), x2: sx(high), y1: MIDDLE, y2: MIDDLE }, drawing);
  for (const end of [low, high]) {
    svg("line", { class: "interval", x1: sx(end), x2: sx(end), y1: MIDDLE - 5, y2: MIDDLE + 5 }, drawing);
  }
  svg("circle", { class: "estimate", cx: sx(value), cy: MIDDLE, r: 4.5 }, drawing);
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "rest-result", "Result on the held-out remainder");
  const sentence = html("p", { class: "sentence", role: "status" }, root);
  const verdict = html("strong", "", sentence);
  const details = html("span", "", sentence);
  const view = { class: "change", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, "aria-hidden": true }; // the sentence has its numbers
  const drawing = svg("svg", view, root);

  const draw = () => {
    const [said, interval] = [model.get("verdict"), model.get("interval")];
    verdict.textContent = said ? `${said[0].toUpperCase()}${said.slice(1)}: ` : "";
    details.textContent = model.get("details");
    drawing.style.display = interval.length ? "" : "none";
    if (interval.length) drawInterval(drawing, interval);
    else drawing.replaceChildren();
  };
  return follow(model, { verdict: draw, details: draw, interval: draw, error });
}

export default { render };
