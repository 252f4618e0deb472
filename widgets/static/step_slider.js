// A slider over whole numbers: the browser's own, with its keys; beside it its number, which screen readers announce.

import { follow, html, keepKeys, put, rootOf } from "./shared.js";

function render({ model, el }) {
  const { root, error } = rootOf(el, "step-slider", model.get("label"));
  const row = html("label", "row", root);
  const name = html("span", "name", row);
  const slider = html("input", { type: "range", step: 1 }, row);
  const number = html("output", "", row); // a live region
  let dragged = false;

  const draw = () => {
    name.textContent = model.get("label");
    row.title = model.get("help");
    slider.setAttribute("aria-label", model.get("label")); // else the number is part of its name
    Object.assign(slider, { min: model.get("first"), max: model.get("last") }); // before the value, which they bound
    if (!dragged) slider.value = model.get("value"); // the last step of a run in training grows during the drag
    slider.disabled = model.get("disabled");
    const unit = model.get("unit");
    number.textContent = unit ? `${slider.value} ${unit}` : `${slider.value} of ${slider.max}`;
    if (unit) slider.setAttribute("aria-valuetext", number.textContent);
  };
  slider.addEventListener("input", () => {
    dragged = true;
    draw();
  });
  slider.addEventListener("change", () => {
    dragged = false;
    put(model, "value", Number(slider.value));
  });
  slider.addEventListener("pointerup", () =>
    setTimeout(() => {
      dragged = false; // released at the value where it was pressed, which is no change
      draw();
    }),
  );
  slider.addEventListener("keydown", (event) => keepKeys(event));
  return follow(model, { label: draw, first: draw, last: draw, value: draw, unit: draw, disabled: draw, error });
}

export default { render };
