// The current activity and the last error; the panel around them keeps its keys from JupyterLab, and shows when it is busy.

import { follow, html, keepKeys, put, takeKey } from "./shared.js";

const FIELDS = ".widget-dropdown, .number-field, .step-slider, [data-asks]";
const BUTTONS = ".jupyter-button, button[data-asks], canvas.text";

/** JupyterLab takes arrows and letters in a list or on a button for its commands: the next cell, another cell, this one cut. */
function onKey(event) {
  if (event.target.multiple && (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "a") {
    for (const option of event.target.options) option.selected = true; // not all cells of the notebook
    event.target.dispatchEvent(new Event("change", { bubbles: true }));
    takeKey(event);
  } else if (event.key !== "Enter" || !event.shiftKey) keepKeys(event);
}

/** Listens at the panel, after the elements inside; a second call for the same panel adds nothing. */
const listenToPanel = (event) => event.target.closest?.(".refine-panel")?.addEventListener("keydown", onKey);

/** Whether an event is the use of a control that Python answers. */
function asks({ type, target, key }) {
  if (type === "change") return target.closest(FIELDS) !== null;
  if (type === "keydown") return target.matches("canvas.text") && (key === "Enter" || key === " ");
  return target.closest(BUTTONS) !== null;
}

/** Holds a click on a button until Python has answered what is typed in its panel, then clicks again; false if all is answered. */
function held(event) {
  const panel = event.target.closest(".refine-panel");
  const button = event.target.closest(BUTTONS);
  if (event.type !== "click" || !button?.matches("button") || !panel.querySelector("[data-unanswered]")) return false;
  event.stopImmediatePropagation();
  event.preventDefault();
  const press = () => {
    if (panel.querySelector("[data-unanswered]")) return;
    panel.removeEventListener("refine-answered", press);
    button.click();
  };
  panel.addEventListener("refine-answered", press);
  return true;
}

function render({ model, el }) {
  const root = html("div", "refine-lab notice", el);
  const working = html("div", { class: "working", "aria-hidden": true }, root, "Working…");
  const status = html("div", { class: "status", role: "status" }, root); // announced when the reader is idle
  const error = html("div", { class: "error", role: "alert" }, root); // announced at once
  const onFocus = (event) => listenToPanel(event); // one function per notice, so that each removes only its own
  let asked = model.get("asked");

  function draw() {
    const busy = model.get("busy") || (!model.alone && asked > model.get("answered"));
    working.hidden = !busy;
    root.classList.toggle("unanswered", asked > model.get("answered")); // the status is that of an earlier use
    const panel = root.closest(".refine-panel");
    panel?.classList.toggle("busy", busy);
    panel?.classList.toggle("stale", model.get("stale"));
    panel?.setAttribute("aria-busy", busy);
  }
  /** Marks the panel at once, before the controls' own messages are sent; Python gets the count after them. */
  function onUse(event) {
    if (!event.target.closest?.(".refine-panel")?.contains(root) || !asks(event) || held(event)) return;
    asked = Math.max(asked, model.get("asked")) + 1;
    draw();
    setTimeout(() => put(model, "asked", asked));
  }
  document.addEventListener("focusin", onFocus);
  for (const type of ["click", "change", "keydown"]) document.addEventListener(type, onUse, true);
  requestAnimationFrame(draw); // the panel is around the notice only then
  const end = () => {
    document.removeEventListener("focusin", onFocus);
    for (const type of ["click", "change", "keydown"]) document.removeEventListener(type, onUse, true);
  };
  return follow(model, { status, error, busy: draw, stale: draw, answered: draw }, end);
}

export default { render };
