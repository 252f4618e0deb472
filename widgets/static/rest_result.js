// The results on the held-out remainder: a sentence for each, and a drawing of their intervals beside 0.

import { extent, follow, html, rootOf, svg, ticks, tickTexts } from "./shared.js";

const [WIDTH, EDGE, ROW, TOP] = [320, 26, 24, 16]; // of the drawing, in px; EDGE is its left and right margin

function drawIntervals(drawing, results) {
  drawing.replaceChildren();
  drawing.style.display = results.length ? "" : "none";
  if (!results.length) return;
  const bottom = TOP + ROW * (results.length - 1) + 14;
  drawing.setAttribute("viewBox", `0 0 ${WIDTH} ${bottom + 28}`);
  const [first, last] = extent([results.flatMap(({ interval: [low, , high] }) => [low, high]), [0]], 0.08);
  const sx = (x) => EDGE + ((x - first) / (last - first)) * (WIDTH - 2 * EDGE);
  const places = ticks(first, last, 3);
  const texts = tickTexts(places);
  places.forEach((tick, i) => {
    svg("line", { class: tick === 0 ? "zero" : "grid", x1: sx(tick), x2: sx(tick), y1: 2, y2: bottom }, drawing);
    svg("text", { x: sx(tick), y: bottom + 13, "text-anchor": "middle" }, drawing, texts[i]);
  });
  const [of, better] = results[0].pair ? ["difference", "the first is better"] : ["change", "better"];
  const unit = `${of} in nats per token; below 0: ${better}`;
  svg("text", { x: WIDTH / 2, y: bottom + 26, "text-anchor": "middle" }, drawing, unit);
  results.forEach(({ name, interval: [low, value, high], look }, row) => {
    const y = TOP + ROW * row;
    const group = svg("g", { style: `color: ${look < 0 ? "var(--ink)" : `var(--series-${look})`}` }, drawing);
    svg("line", { class: "interval", x1: sx(low), x2: sx(high), y1: y, y2: y }, group);
    for (const end of [low, high]) svg("line", { class: "interval", x1: sx(end), x2: sx(end), y1: y - 5, y2: y + 5 }, group);
    svg("circle", { class: "estimate", cx: sx(value), cy: y, r: 4.5 }, group);
    const middle = Math.min(Math.max((sx(low) + sx(high)) / 2, 60), WIDTH - 60);
    svg("text", { x: middle, y: y - 7, "text-anchor": "middle" }, drawing, name);
  });
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "rest-result", "Result on the held-out remainder");
  const sentences = html("div", { class: "sentences", role: "status" }, root);
  const drawings = html("div", "drawings", root);
  const [pairs, changes] = [1, 2].map(() => svg("svg", { class: "change", "aria-hidden": true }, drawings)); // the sentences say it

  const draw = () => {
    const results = model.get("results");
    sentences.replaceChildren();
    for (const { name, verdict, details } of results) {
      const line = html("p", "sentence", sentences);
      const said = `${verdict[0].toUpperCase()}${verdict.slice(1)}: `;
      html("strong", "", line, name ? `${name}. ${said}` : said);
      html("span", "", line, details);
    }
    const known = results.filter(({ interval }) => interval.length);
    drawIntervals(pairs, known.filter(({ pair }) => pair)); // apart: a difference is far smaller than a change
    drawIntervals(changes, known.filter(({ pair }) => !pair));
  };
  return follow(model, { results: draw, error });
}

export default { render };
