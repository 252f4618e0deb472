// What happens now, and what went wrong; and, for the panel around it, that keys pressed in it stay there.

import { follow, html } from "./shared.js";

/** JupyterLab takes arrows and letters in a list or on a button for its commands: the next cell, another cell, this one cut. */
function keepKeys(event) {
  if (event.target.multiple && (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "a") {
    for (const option of event.target.options) option.selected = true; // not all cells of the notebook
    event.target.dispatchEvent(new Event("change", { bubbles: true }));
    event.preventDefault();
    event.stopPropagation();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.key === "Tab" || (event.key === "Enter" && event.shiftKey)) return;
  event.stopPropagation();
}

/** Listens at the panel, so that what is inside has had its keys; only the first time for each. */
function keepKeysOf(event) {
  event.target.closest?.(".refine-panel")?.addEventListener("keydown", keepKeys);
}

function render({ model, el }) {
  const root = html("div", "refine-lab notice", el);
  const status = html("div", "status", root);
  status.setAttribute("role", "status"); // announced when the reader is idle
  const error = html("div", "error", root);
  error.setAttribute("role", "alert"); // announced at once
  const stop = follow(model, {
    status: () => (status.textContent = model.get("status")),
    error: () => (error.textContent = model.get("error")),
  });
  const keep = (event) => keepKeysOf(event); // one for each notice, so that each takes back its own
  document.addEventListener("focusin", keep);
  return () => {
    document.removeEventListener("focusin", keep);
    stop();
  };
}

export default { render };
