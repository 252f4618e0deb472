// The columns of the run table and the order of its rows, without a page.

import { duration, format } from "./shared.js";

const MISSING = "–";

const metric = (helps) => (heading, i) => ({
  key: `metric:${heading}`,
  heading,
  title: helps[i],
  number: true,
  value: (row) => row.metrics[heading],
  text: (row) => (heading in row.metrics ? rounded(row.metrics[heading]) : MISSING),
});

const setting = ({ name, label }) => ({
  key: `setting:${name}`,
  heading: label,
  kind: "setting",
  title: name,
  value: (row) => asNumber(row.settings[name]),
  text: (row) => row.settings[name] ?? MISSING,
});

/** Four digits, also where the last ones are 0, so that a column's numbers end at the same place. */
const rounded = (value) => (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? value.toPrecision(4) : format(value));

function asNumber(text) {
  return text !== undefined && text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

/** What a run's progress says beside its bar, and more in the tooltip. */
export const stepsText = ({ step, steps }) => (steps ? `${format(step)}/${format(steps)}` : MISSING);
export function speedText({ speed, left }) {
  const facts = [];
  if (speed) facts.push(`${Math.round(speed).toLocaleString("en")} tokens/s`);
  if (Number.isFinite(left)) facts.push(`${duration(left)} left`);
  return facts.join(" · ");
}

const plain = (heading, key, more = {}) => ({ key, heading, value: (row) => row[key], text: (row) => String(row[key]), ...more });

/** Whether the values of a column differ within a group of rows, among those that have one. */
function differs(rows, column) {
  const groups = new Map();
  for (const row of rows) {
    const value = column.text(row);
    if (value === MISSING) continue;
    if (groups.has(row.experiment) && groups.get(row.experiment) !== value) return true;
    groups.set(row.experiment, value);
  }
  return false;
}

/** The columns for these rows: a metric that none of them has, and a setting in which they agree, is none. */
export function columnsOf(rows, metrics, settings, every, helps = []) {
  const shown = settings.filter(({ by_method }) => every || !by_method).map(setting);
  return [
    plain("method", "method", { kind: "method" }),
    plain("seed", "seed", { kind: "seed number", number: true }),
    plain("state", "state", { kind: "state" }),
    { key: "progress", heading: "progress", kind: "steps", value: ({ step, steps }) => (steps ? step / steps : undefined), text: stepsText },
    ...metrics.map(metric(helps)).filter((column) => rows.some((row) => column.value(row) !== undefined)),
    ...shown.filter((column) => differs(rows, column)),
    plain("run", "name", { kind: "name" }),
  ];
}

/** The rows that contain each word of `filter` in some cell, in any case. */
export function filtered(rows, filter) {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const textOf = (row) =>
    [row.name, row.experiment, row.method, `seed ${row.seed}`, row.state, row.error, row.remark]
      .concat(Object.entries(row.settings).map(([name, value]) => `${name} ${value}`))
      .join("\n")
      .toLowerCase();
  return words.length ? rows.filter((row) => words.every((word) => textOf(row).includes(word))) : rows;
}

/** The rows ordered by a column, rows without a value last; without a column as they are. */
export function sorted(rows, column, descending) {
  if (!column) return rows;
  const sign = descending ? -1 : 1;
  const order = (one, other) => {
    const [a, b] = [column.value(one), column.value(other)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    if (typeof a === "number" && typeof b === "number") return sign * (a - b);
    return sign * String(a).localeCompare(String(b), "en", { numeric: true });
  };
  return [...rows].sort(order);
}

/** The order after a press on a column's head: descending, ascending, then newest first. */
export function nextOrder([key, descending], pressed) {
  if (key !== pressed) return [pressed, true];
  return descending ? [pressed, false] : ["", false];
}

/**
 * Pairs of an experiment and its rows, one pair without grouping. `known`: the same rows in the order of the experiments,
 * which an order within each group leaves as it is.
 */
export function grouping(rows, grouped, known = rows) {
  if (!grouped) return [["", rows]];
  const groups = new Map(known.map(({ experiment }) => [experiment, []]));
  for (const row of rows) groups.get(row.experiment).push(row);
  return [...groups];
}
