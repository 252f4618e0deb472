// A slider over steps: the browser's own, which knows its keys; its number beside it, which screen readers are told.

import { follow, html, keepLetters, put, rootOf } from "./shared.js";

function render({ model, el }) {
  const { root, error } = rootOf(el, "step-slider", model.get("label"));
  const row = html("label", "row", root);
  const name = html("span", "name", row);
  const slider = html("input", "", row);
  Object.assign(slider, { type: "range", step: 1 });
  const number = html("output", "", row); // a live region

  let dragged = false;

  const count = () => {
    number.textContent = `${slider.value} of ${slider.max}`;
  };
  const draw = () => {
    name.textContent = model.get("label");
    slider.setAttribute("aria-label", model.get("label")); // else the number is part of its name
    Object.assign(slider, { min: model.get("first"), max: model.get("last") }); // before the value, which they bound
    if (!dragged) slider.value = model.get("value"); // a run that is being trained grows under the hand
    slider.disabled = model.get("disabled");
    count();
    error.textContent = model.get("error");
  };
  slider.addEventListener("input", () => {
    dragged = true;
    count();
  });
  slider.addEventListener("change", () => {
    dragged = false;
    put(model, "value", Number(slider.value));
  });
  slider.addEventListener("pointerup", () =>
    setTimeout(() => {
      dragged = false; // let go where it was taken, which is no change
      draw();
    }),
  );
  slider.addEventListener("keydown", keepLetters);
  const traits = ["label", "first", "last", "value", "disabled", "error"];
  return follow(model, Object.fromEntries(traits.map((trait) => [trait, draw])));
}

export default { render };
