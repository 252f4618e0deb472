// Widgets in a page of their own: to a widget's module a model is what Jupyter's is, with nobody behind it.

function revived(name, value) {
  if (value === null || typeof value !== "object" || typeof value.base64 !== "string") return value;
  const bytes = Uint8Array.from(atob(value.base64), (letter) => letter.charCodeAt(0));
  return new DataView(bytes.buffer);
}

function modelOf(state) {
  const listeners = new Map();
  const fire = (event, ...values) => [...(listeners.get(event) ?? [])].forEach((listener) => listener(...values));
  return {
    alone: true, // nobody answers a message
    get: (name) => state[name],
    set(name, value) {
      if (Object.is(state[name], value)) return;
      state[name] = value;
      fire(`change:${name}`, this, value);
      fire("change", this);
    },
    save_changes() {},
    send() {},
    on(event, listener) {
      if (!listeners.has(event)) listeners.set(event, new Set());
      listeners.get(event).add(listener);
    },
    off(event, listener) {
      if (listener) listeners.get(event)?.delete(listener);
      else listeners.delete(event);
    },
  };
}

async function show({ widgets, links }) {
  const models = widgets.map(({ state }) => modelOf(state));
  for (const [one, name, other, its] of links) {
    models[one].on(`change:${name}`, () => models[other].set(its, models[one].get(name)));
  }
  for (const [index, { esm, css }] of widgets.entries()) {
    document.head.append(Object.assign(document.createElement("style"), { textContent: css }));
    const el = document.createElement("div");
    document.querySelector("main").append(el);
    const address = URL.createObjectURL(new Blob([esm], { type: "text/javascript" }));
    const module = (await import(address)).default;
    await module.initialize?.({ model: models[index] });
    await module.render({ model: models[index], el });
  }
}

await show(JSON.parse(document.getElementById("data").textContent, revived));
