// The current activity and the last error; the panel around them keeps its keys from JupyterLab.

import { follow, html, keepKeys, takeKey } from "./shared.js";

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

function render({ model, el }) {
  const root = html("div", "refine-lab notice", el);
  const status = html("div", { class: "status", role: "status" }, root); // announced when the reader is idle
  const error = html("div", { class: "error", role: "alert" }, root); // announced at once
  const onFocus = (event) => listenToPanel(event); // one function per notice, so that each removes only its own
  document.addEventListener("focusin", onFocus);
  return follow(model, { status, error }, () => document.removeEventListener("focusin", onFocus));
}

export default { render };
