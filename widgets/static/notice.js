// The current activity and the last error; the panel around them keeps its keys from JupyterLab.

import { follow, html, takeKey } from "./shared.js";

/** JupyterLab takes arrows and letters in a list or on a button for its commands: the next cell, another cell, this one cut. */
function keepKeys(event) {
  const command = event.ctrlKey || event.metaKey;
  if (event.target.multiple && command && event.key.toLowerCase() === "a") {
    for (const option of event.target.options) option.selected = true; // not all cells of the notebook
    event.target.dispatchEvent(new Event("change", { bubbles: true }));
    takeKey(event);
  } else if (!command && event.key !== "Tab" && !(event.key === "Enter" && event.shiftKey)) event.stopPropagation();
}

/** Listens at the panel, after the elements inside; a second call for the same panel adds nothing. */
const keepKeysOf = (event) => event.target.closest?.(".refine-panel")?.addEventListener("keydown", keepKeys);

function render({ model, el }) {
  const root = html("div", "refine-lab notice", el);
  const status = html("div", { class: "status", role: "status" }, root); // announced when the reader is idle
  const error = html("div", { class: "error", role: "alert" }, root); // announced at once
  const keep = (event) => keepKeysOf(event); // one function per notice, so that each removes only its own
  document.addEventListener("focusin", keep);
  return follow(model, { status, error }, () => document.removeEventListener("focusin", keep));
}

export default { render };
