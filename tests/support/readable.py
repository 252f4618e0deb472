"""Whether people can read and reach what a page shows: contrasts, names and the order of Tab, as Chromium has them."""

from __future__ import annotations

from typing import Any

import pytest

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: pip install -e '.[dev]'")

ENOUGH = 4.5
"""Contrast of text with its ground, at least (WCAG 2, level AA)."""

CONTRASTS = """(root) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const brush = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => { brush.clearRect(0, 0, 1, 1); brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
    return [...brush.getImageData(0, 0, 1, 1).data].map((part) => part / 255); };
  const over = ([r, g, b, a], below) => [r, g, b].map((part, i) => part * a + below[i] * (1 - a));
  const light = (rgb) => rgb.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => node ? over(rgba(getComputedStyle(node).backgroundColor), ground(node.parentElement)) : [1, 1, 1];
  const opacity = (node) => (node ? Number(getComputedStyle(node).opacity) * opacity(node.parentElement) : 1);
  const seen = (node, box) => node.checkVisibility({ opacityProperty: true, visibilityProperty: true })
    && box.width > 1 && box.height > 1 && !node.closest(".unseen, :disabled, option");
  const contrast = (node, colour) => {
    const below = ground(node);
    const [r, g, b, a] = rgba(colour);
    const [one, other] = [light(over([r, g, b, a * opacity(node)], below)), light(below)];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  };
  const found = [];
  const look = (node, text, box, colour) => {
    const name = `${node.closest("[class]")?.getAttribute("class") ?? ""}: ${text.trim().slice(0, 40)}`;
    if (text.trim() && seen(node, box)) found.push([name, contrast(node, colour)]);
  };
  for (const top of document.querySelectorAll(root)) {
    const walker = document.createTreeWalker(top, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const [text, node] = [walker.currentNode, walker.currentNode.parentElement];
      if (node.matches("script, style, title, option")) continue;
      const range = document.createRange();
      range.selectNode(text);
      const style = getComputedStyle(node);
      look(node, text.data, range.getBoundingClientRect(), node.closest("svg") ? style.fill : style.color);
    }
    for (const node of top.querySelectorAll("input, select, textarea")) {
      const text = node.value || node.placeholder || "";
      const shown = node.value || !node.placeholder ? node : [node, "::placeholder"];
      const style = Array.isArray(shown) ? getComputedStyle(...shown) : getComputedStyle(node);
      if (!["checkbox", "range", "radio"].includes(node.type)) look(node, text, node.getBoundingClientRect(), style.color);
    }
  }
  return found;
}"""

STOPS = """(root) => [...document.querySelectorAll(root)].flatMap((top) => [...top.querySelectorAll("*")])
  .filter((node) => node.tabIndex >= 0 && node.matches("a[href], button, input, select, textarea, summary, [tabindex]")
    && !node.matches(":disabled") && node.checkVisibility({ visibilityProperty: true }))"""


def contrasts(page: Any, root: str = ".refine-lab") -> dict[str, float]:
    """By class and beginning of every text that is seen under `root`: its contrast with what is behind it; the lowest."""
    lowest: dict[str, float] = {}
    for text, ratio in page.evaluate(CONTRASTS, root):
        lowest[text] = min(ratio, lowest.get(text, ratio))
    return lowest


def unreadable(page: Any, root: str = ".refine-lab") -> dict[str, float]:
    """Those of less than 4.5."""
    return {text: round(ratio, 2) for text, ratio in contrasts(page, root).items() if ratio < ENOUGH}


def unreached(page: Any, root: str = ".refine-lab", *, inside: bool = False) -> list[str]:
    """What can be acted on under `root` and is not come to by Tab from the beginning of the page.

    `inside`: from the first of it, as in JupyterLab, where much comes before that is not ours.
    """
    page.evaluate(f"window.missed = new Set(({STOPS})({root!r}))")
    page.evaluate("document.activeElement?.blur()")
    if inside:
        page.evaluate(
            "() => { const [first] = window.missed; first.focus(); window.missed.delete(document.activeElement); }"
        )
    for _ in range(page.evaluate("window.missed.size") + 10):
        page.keyboard.press("Tab")
        page.evaluate("window.missed.delete(document.activeElement)")
    return page.evaluate("[...window.missed].map((node) => node.outerHTML.slice(0, 120))")


def violations(page: Any, root: str = ":root") -> list[str]:
    """What axe finds serious or critical under `root`: the rule, the element, and what is wrong with it."""
    response = axe.Axe().run(page, context=root).response
    return [
        f"{found['id']}: {node['html'][:120]}: {node['failureSummary']}"
        for found in response["violations"]
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]


VSCODE = {
    "vscode-light": ("#3b3b3b", "#ffffff"),
    "vscode-dark": ("#cccccc", "#1f1f1f"),
    "vscode-light solarized": ("#657b83", "#fdf6e3"),
    "vscode-dark solarized": ("#839496", "#002b36"),
}
"""Kinds of VS Code's themes, with the colour of text and its ground: its default ones, and two of little contrast."""


def like_vscode(page: Any, theme: str) -> None:
    """Gives the page what VS Code gives the page of a notebook's outputs: the kind of theme and its colours."""
    ink, ground = VSCODE[theme]
    page.evaluate(
        """([kind, ink, ground]) => {
            document.documentElement.style.setProperty("--vscode-editor-foreground", ink);
            document.documentElement.style.setProperty("--vscode-editor-background", ground);
            Object.assign(document.body.style, { color: ink, background: ground });
            document.body.dataset.vscodeThemeKind = kind; }""",
        [theme.split()[0], ink, ground],
    )


def stops(page: Any, root: str = ".refine-lab") -> int:
    """How many things can be acted on under `root`."""
    return page.evaluate(f"({STOPS})({root!r}).length")


def nameless(page: Any, root: str = "html") -> list[str]:
    """Roles of what takes the focus under `root` and has no name for a screen reader."""
    session = page.context.new_cdp_session(page)
    document = session.send("DOM.getDocument")["root"]["nodeId"]
    tops = session.send("DOM.querySelectorAll", {"nodeId": document, "selector": root})["nodeIds"]
    nodes = [node for top in tops for node in session.send("Accessibility.queryAXTree", {"nodeId": top})["nodes"]]
    session.detach()
    found = []
    for node in nodes:
        takes = any(each["name"] == "focusable" and each["value"].get("value") for each in node.get("properties", []))
        role = node.get("role", {}).get("value", "")
        if takes and not node["ignored"] and role not in ("RootWebArea", "MenuListPopup", "option"):
            name = node.get("name", {}).get("value", "")
            found += [role] if not name.strip() else []
    return found
