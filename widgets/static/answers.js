// Two answers in fields that take the focus, so that the keyboard scrolls and copies them, and no change.

import { follow, html } from "./shared.js";

/** JupyterLab would act on the key too, on that for "select all" even before the field does. */
function keepKeys(event) {
  const command = event.ctrlKey || event.metaKey;
  if (event.key !== "Tab" && (!command || "ac".includes(event.key.toLowerCase()))) event.stopPropagation();
}

function render({ model, el }) {
  const root = html("div", "refine-lab answers", el);
  const listeners = {};
  for (const when of ["before", "after"]) {
    const field = html("textarea", "", html("label", "", root, `answer ${when} adaptation`));
    Object.assign(field, { readOnly: true, rows: 2 });
    field.addEventListener("keydown", keepKeys);
    listeners[when] = () => {
      field.value = model.get(when);
    };
  }
  return follow(model, listeners);
}

export default { render };
