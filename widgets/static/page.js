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

async function show({ widgets, links }) {
  const models = widgets.map(({ state }) => modelOf(state));
  for (const [one, name, other, target] of links) {
    models[one].on(`change:${name}`, () => models[other].set(target, models[one].get(name)));
  }
  for (const [index, { esm, css }] of widgets.entries()) {
    document.head.append(Object.assign(document.createElement("style"), { textContent: css }));
    const el = document.createElement("div");
    document.querySelector("main").append(el);
    const module = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
    module.default.render({ model: models[index], el });
  }
}

await show(JSON.parse(document.getElementById("data").textContent, revived));
