// Two answers in read-only fields that take the focus, so that the keyboard scrolls and copies them.

import { follow, html, keepKeys } from "./shared.js";

function render({ model, el }) {
  const root = html("div", "refine-lab answers", el);
  const listeners = ["before", "after"].map((when) => {
    const field = html("textarea", { readonly: true, rows: 2 }, html("label", "", root, `answer ${when} adaptation`));
    field.addEventListener("keydown", (event) => keepKeys(event, "ac")); // select all, copy
    return [when, () => (field.value = model.get(when))]; // as its value, or the text would be part of the label
  });
  return follow(model, Object.fromEntries(listeners));
}

export default { render };
