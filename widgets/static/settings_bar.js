// Presets, undo and cancel, which Python carries out, and copies of the settings' texts.

import { button, copyText, follow, html, keepKeys, rootOf } from "./shared.js";

function render({ model, el }) {
  const { root, error } = rootOf(el, "settings-bar", "Settings");
  const row = html("div", "row", root);
  const label = html("label", "", row, "preset ");
  const select = html("select", { "data-asks": "" }, label);
  const undo = button(row, "Undo", () => model.send({ act: "undo" }), { title: "Undo the last change of a setting", "data-asks": "" });
  const cancel = button(row, "Cancel", () => model.send({ act: "cancel" }), { title: "Cancel the pending reading, rollouts or rewards" });
  html("span", "quiet", row, "copy settings as");
  const copies = html("span", "copies", row);
  const status = html("span", { class: "quiet", role: "status" }, row);
  const note = html("div", "quiet", root);

  const draw = () => {
    const none = Object.assign(html("option", { disabled: true }, null, "none"), { value: "" });
    select.replaceChildren(none, ...model.get("presets").map((name) => html("option", { value: name }, null, name)));
    select.value = model.get("preset");
  };
  const drawCopies = () => {
    const focused = [...copies.children].indexOf(document.activeElement);
    copies.replaceChildren();
    for (const [name, text] of model.get("copies")) {
      button(copies, name, async () => {
        const done = await copyText(text, root);
        status.textContent = done ? `Settings copied as ${name}.` : "The browser does not allow copying.";
      }, { title: text });
    }
    copies.children[focused]?.focus();
    status.textContent = "";
  };
  select.addEventListener("change", () => {
    model.send({ act: "preset", name: select.value });
    select.value = model.get("preset"); // until Python has accepted it
  });
  root.addEventListener("keydown", (event) => keepKeys(event));
  const listeners = {
    presets: draw,
    preset: draw,
    copies: drawCopies,
    can_undo: () => (undo.disabled = !model.get("can_undo")),
    can_cancel: () => (cancel.disabled = !model.get("can_cancel")),
    note,
    error,
  };
  return follow(model, listeners);
}

export default { render };
