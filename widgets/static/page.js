// Widgets in a page without Python. The model has the methods of Jupyter's model that the widgets' modules call.

function revived(name, value) {
  if (typeof value?.base64 !== "string") return value;
  return new DataView(Uint8Array.from(atob(value.base64), (letter) => letter.charCodeAt(0)).buffer);
}

function modelOf(state) {
  const listeners = {};
  return {
    alone: true, // without Python, no message is answered
    get: (name) => state[name],
    set(name, value) {
      if (Object.is(state[name], value)) return;
      state[name] = value;
      for (const listener of listeners[`change:${name}`] ?? []) listener();
    },
    save_changes() {},
    off() {},
    on: (event, listener) => (listeners[event] ??= []).push(listener),
  };
}

const node = (name, parent, text) => parent.appendChild(Object.assign(document.createElement(name), { textContent: text }));

function showHead({ title, conclusion, facts }) {
  const header = document.querySelector("header");
  node("h1", header, title);
  if (conclusion) Object.assign(node("p", header, conclusion), { className: "conclusion" });
  const list = node("dl", header, "");
  for (const [name, value] of facts) {
    const pair = node("div", list, "");
    node("dt", pair, name);
    node("dd", pair, value);
  }
}

async function show({ head, widgets, links }) {
  showHead(head);
  const models = widgets.map(({ state }) => modelOf(state));
  for (const [one, name, other, target] of links) {
    models[one].on(`change:${name}`, () => models[other].set(target, models[one].get(name)));
  }
  for (const [index, { esm, css, heading }] of widgets.entries()) {
    document.head.append(Object.assign(document.createElement("style"), { textContent: css }));
    const section = node("section", document.querySelector("main"), "");
    if (heading) node("h2", section, heading);
    const el = node("div", section, "");
    const module = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
    module.default.render({ model: models[index], el });
  }
}

await show(JSON.parse(document.getElementById("data").textContent, revived));
