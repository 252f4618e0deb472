// What happens now, and what went wrong.

import { html } from "./shared.js";

function render({ model, el }) {
  const root = html("div", "refine-lab notice", el);
  const status = html("div", "status", root);
  status.setAttribute("role", "status"); // announced when the reader is idle
  const error = html("div", "error", root);
  error.setAttribute("role", "alert"); // announced at once
  const show = () => {
    status.textContent = model.get("status");
    error.textContent = model.get("error");
  };
  model.on("change:status", show);
  model.on("change:error", show);
  show();
  return () => {
    model.off("change:status", show);
    model.off("change:error", show);
  };
}

export default { render };
