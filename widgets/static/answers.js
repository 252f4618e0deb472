// Two answers in read-only fields that take the focus, so that the keyboard scrolls and copies them.

import { follow, html } from "./shared.js";

/** JupyterLab would act on the key too, and on "select all" even before the field does. */
function keepKeys(event) {
  const command = event.ctrlKey || event.metaKey;
  if (event.key !== "Tab" && (!command || "ac".includes(event.key.toLowerCase()))) event.stopPropagation();
}

function render({ model, el }) {
  const root = html("div", "refine-lab answers", el);
  const [before, after] = ["before", "after"].map((when) => {
    const field = html("textarea", { readonly: true, rows: 2 }, html("label", "", root, `answer ${when} adaptation`));
    field.addEventListener("keydown", keepKeys);
    return field;
  });
  return follow(model, { before, after });
}

export default { render };
