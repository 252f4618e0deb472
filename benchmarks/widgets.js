// In the page: what is done, what is seen, and the milliseconds between the two. Driven by widgets.py.

window.bench = (() => {
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((node) => node.offsetParent !== null);
  const done = {
    run(index) {
      window.jupyterapp.shell.currentWidget.content.activeCellIndex = index;
      window.jupyterapp.commands.execute("notebook:run-cell");
    },
    click([x, y]) {
      const [canvas] = shown(".token-map canvas.text");
      const box = canvas.getBoundingClientRect();
      const at = { clientX: box.left + x, clientY: box.top + y, bubbles: true, button: 0, pointerId: 1 };
      for (const kind of ["pointerdown", "pointerup", "click"]) canvas.dispatchEvent(new PointerEvent(kind, at));
    },
    enter() {
      shown(".token-map canvas.text")[0].dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true }));
    },
    choose(value) {
      const select = shown("select").find((node) => [...node.options].some((option) => option.value === value || option.text === value));
      select.value = [...select.options].find((option) => option.value === value || option.text === value).value;
      select.dispatchEvent(new Event("change", { bubbles: true }));
    },
    press(label) {
      shown("button").find((node) => node.textContent.trim() === label).click();
    },
  };
  const seen = {
    /** A number that another picture of the map changes; null while nothing is painted. */
    map() {
      const [canvas] = shown(".token-map canvas.text");
      if (!canvas?.width || !canvas.height) return null;
      const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, Math.min(canvas.height, 240)).data;
      let sum = 0;
      for (let i = 0; i < data.length; i += 4) sum = (sum * 31 + data[i] + 3 * data[i + 1] + 7 * data[i + 2] + data[i + 3]) % 1000000007;
      return sum || null;
    },
    /** What Python answered to the last click. */
    answer: () => shown(".token-map .status").map((node) => node.textContent).find((text) => text.includes("Python has")) ?? null,
    /** The number of tokens of the painted document, which every reading here changes. */
    read: () => shown(".token-map[data-painted]").at(-1)?.dataset.tokens ?? null,
    rollouts: () => shown(".notice .status")[0]?.textContent.match(/rollouts at .*/)?.[0] ?? null,
  };

  async function until(act, look, argument, patience) {
    const before = seen[look]();
    const began = performance.now();
    done[act](argument);
    for (;;) {
      await new Promise(requestAnimationFrame);
      const waited = performance.now() - began;
      const now = seen[look]();
      if (now !== null && now !== before) return waited;
      if (waited > patience) return null;
    }
  }

  /** The 95th percentile of the frames of a scroll through the map. */
  async function scroll() {
    const [box] = shown(".token-map .scroller");
    const frames = [];
    box.scrollTop = 0;
    for (let i = 0; i < 90; i++) {
      const began = performance.now();
      box.scrollTop += 120;
      await new Promise(requestAnimationFrame);
      frames.push(performance.now() - began);
    }
    return frames.slice(5).sort((a, b) => a - b)[Math.floor(0.95 * 85)];
  }
  return { until, scroll };
})();
