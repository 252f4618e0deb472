// Two answers in fields that take the focus, so that the keyboard scrolls and copies them, and no change.

import { html } from "./shared.js";

/** JupyterLab would act on the key too, on that for "select all" even before the field does. */
function keepKeys(event) {
  const command = event.ctrlKey || event.metaKey;
  if (event.key !== "Tab" && (!command || "ac".includes(event.key.toLowerCase()))) event.stopPropagation();
}

function render({ model, el }) {
  const root = html("div", "refine-lab answers", el);
  const fields = ["before", "after"].map((when) => {
    const label = html("label", "", root, `answer ${when} adaptation`);
    const field = html("textarea", "", label);
    Object.assign(field, { readOnly: true, rows: 2 });
    field.addEventListener("keydown", keepKeys);
    const show = () => {
      field.value = model.get(when);
    };
    model.on(`change:${when}`, show);
    show();
    return { when, show };
  });
  return () => {
    for (const { when, show } of fields) model.off(`change:${when}`, show);
  };
}

export default { render };
