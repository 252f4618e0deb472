// Text of one line or several, with a list beside it that sets it. Python answers each text, and buttons of the panel wait for the answer:
// JupyterLab sends the messages of two widgets to two threads of the kernel, where the later one may be handled first.

import { follow, html, keepKeys, rootOf, unanswered } from "./shared.js";

const LIST_PAUSE = 4000; // milliseconds before the list is read again

function render({ model, el }) {
  const { root, error } = rootOf(el, "entry-field", model.get("label"));
  for (const name of ["role", "aria-label"]) root.removeAttribute(name); // its label is enough
  root.dataset.asks = true;
  const id = `entry-${Math.random().toString(36).slice(2)}`;
  html("label", { for: id, title: model.get("help") }, root, model.get("label"));
  const [rows, shared] = [model.get("rows"), { id, spellcheck: false, autocomplete: "off", placeholder: model.get("placeholder") }];
  const input = rows ? html("textarea", { ...shared, rows }, root) : html("input", { ...shared, type: "text" }, root);
  const list = html("select", { "aria-label": model.get("list_label") }, root);
  list.style.minWidth = `min(${model.get("list_label").length + 3}ch, 100%)`; // what it shows when closed is not cut
  root.append(error);
  error.id = `${id}-error`;
  input.setAttribute("aria-describedby", error.id);
  let sent = 0; // texts that Python has not answered
  let known = ""; // the text that was sent or received last
  let asked = 0; // when the list was last asked for

  const choose = () => {
    const names = [...list.options].map(({ value }) => value);
    const at = (name) => (name ? names.indexOf(name) : -1);
    list.selectedIndex = Math.max(at(input.value), at(`runs/${input.value}`), 0); // 0: none of the entries
  };
  const show = () => {
    if (!sent && input.value === known) {
      input.value = model.get("value"); // else more has been typed since
      known = input.value; // whose ends of lines may differ
    }
    choose();
  };
  const build = () => {
    const choices = model.get("choices");
    const groups = new Map();
    list.replaceChildren(html("option", { value: "", disabled: true }, null, model.get("list_label")));
    for (const [value, words, group] of choices) {
      if (!groups.has(group)) groups.set(group, html("optgroup", { label: group }, list));
      html("option", { value }, groups.get(group), words);
    }
    list.hidden = !choices.length;
    choose();
  };
  const commit = () => {
    unanswered(root, ++sent);
    known = input.value;
    model.send({ typed: known });
    choose();
  };
  const refresh = () => {
    if (model.alone || list.hidden || Date.now() - asked < LIST_PAUSE) return;
    asked = Date.now();
    model.send({ list: true });
  };
  const receive = (content) => {
    if (!("taken" in content)) return;
    sent = Math.max(sent - 1, 0);
    show();
    unanswered(root, sent);
  };
  input.addEventListener("change", commit);
  list.addEventListener("change", () => {
    input.value = list.value;
    commit();
  });
  for (const type of ["pointerenter", "focusin"]) root.addEventListener(type, refresh);
  root.addEventListener("keydown", (event) => keepKeys(event));
  model.on("msg:custom", receive);
  const able = () => (input.disabled = list.disabled = model.get("disabled"));
  const showError = () => {
    error.textContent = model.get("error");
    input.setAttribute("aria-invalid", Boolean(model.get("error")));
  };
  const placed = () => input.setAttribute("placeholder", model.get("placeholder"));
  return follow(model, { choices: build, value: show, disabled: able, error: showError, placeholder: placed }, () => model.off("msg:custom", receive));
}

export default { render };
