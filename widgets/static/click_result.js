// The rollouts that begin at the selected token, beside the document: the reference, and below it the rollouts, the best first.

import { shownRows, unpackRollouts } from "./rollout_data.js";
import { decimals, rolloutCells, targetCells } from "./rollout_list.js";
import { button, follow, html, inFrames, keepKeys, put, quantity, rootOf, unpacked } from "./shared.js";

const HINT = "Click a token of the document to see its rollouts here.";

/** The means of some rollouts in one sentence, as in widgets/parts/click_result.py. */
export function meansOf(data, rows, reward) {
  const mean = (name) => rows.reduce((sum, row) => sum + data.numbers[name][row], 0) / rows.length;
  const best = Math.max(...[...rows].map((row) => data.numbers.reward[row]));
  const facts = `mean ${reward} reward ${decimals(mean("reward"))}, best ${decimals(best)}, exact-match rate ${(100 * mean("binary")).toFixed(1)} %`;
  return `${quantity(rows.length, "rollout")}: ${facts}, entropy ${decimals(data.numbers.entropy[rows[0]])} nats`;
}

function render({ model, el }) {
  const { root, error } = rootOf(el, "click-result", "Rollouts of the selected token");
  const heading = html("h3", "", root);
  const means = html("p", { class: "means", role: "status" }, root);
  const list = html("div", "lines", root);

  const draw = inFrames(() => {
    const token = model.get("token");
    const data = unpackRollouts(unpacked(model.get("columns")));
    const at = [token - 1, token - 1];
    const rows = token > 0 ? shownRows(data, { position: at }, ["reward", true]) : [];
    list.replaceChildren();
    heading.textContent = rows.length ? `Rollouts from token ${token}` : "Rollouts";
    means.textContent = rows.length ? meansOf(data, rows, model.get("reward")) : token > 0 ? `No rollouts begin at token ${token}.` : HINT;
    if (!rows.length) return;
    const group = data.group[rows[0]];
    if (data.clicked.has(group)) heading.append(" (clicked; not in the statistics)");
    const target = html("div", "line target", list);
    html("span", "number", target, "reference");
    targetCells(html("span", "flow", target), data, group);
    for (const row of rows) {
      const sample = data.sample_index[row];
      const pick = () => put(model, "chosen", sample);
      const line = button(list, "", pick, { class: "line rollout", title: "Show token by token", "aria-pressed": model.get("chosen") === sample });
      html("span", "number", line, decimals(data.numbers.reward[row]));
      rolloutCells(html("span", "flow", line), data, row);
    }
  });
  root.addEventListener("keydown", (event) => keepKeys(event));
  return follow(model, { columns: draw, token: draw, chosen: draw, reward: draw, error }, draw.cancel);
}

export default { render };
