// A number in the browser's own field. Python checks what is typed and answers with the value that holds.

import { format, html, keepKeys, rootOf, unanswered } from "./shared.js";

function render({ model, el }) {
  const { root } = rootOf(el, "number-field", model.get("label"));
  const id = `number-${Math.random().toString(36).slice(2)}`;
  html("label", { class: "widget-label", for: id, title: model.get("help") }, root, model.get("label"));
  const [low, high, step] = ["min", "max", "step"].map((name) => model.get(name));
  const whole = model.get("whole");
  const range = high > 1e9 ? `≥ ${format(low)}` : `${format(low)}–${format(high)}`;
  const allowed = `${whole ? "A whole number" : "A number"} from ${format(low)} to ${format(high)}`;
  const about = [model.get("help"), allowed].filter(Boolean).join("\n");
  const input = html("input", { id, type: "number", step: whole ? step : "any", min: whole ? low : 0, max: high, title: about }, root);
  html("span", "range", root, range);
  let sent = 0; // values that Python has not answered
  const show = () => {
    if (!sent) input.value = model.get("value");
  };
  const receive = (content) => {
    if (!("value" in content)) return;
    sent = Math.max(sent - 1, 0);
    if (!sent) input.value = content.value;
    unanswered(root, sent);
  };
  input.addEventListener("change", () => {
    unanswered(root, ++sent);
    model.send({ typed: input.value });
  });
  input.addEventListener("keydown", (event) => {
    const by = { ArrowUp: step, ArrowDown: -step }[event.key];
    if (!whole && by) {
      const next = Math.min(Math.max(Number(input.value) + by, low), high);
      input.value = Number(next.toPrecision(12));
      input.dispatchEvent(new Event("change", { bubbles: true }));
      event.preventDefault();
    }
    keepKeys(event);
  });
  model.on("msg:custom", receive);
  model.on("change:value", show);
  show();
  return () => {
    model.off("msg:custom", receive);
    model.off("change:value", show);
  };
}

export default { render };
