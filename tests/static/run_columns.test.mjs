// The order of the run table's rows, from widgets/static/run_columns.js. `node --test tests/static`
import assert from "node:assert/strict";
import test from "node:test";
import { load } from "./load.mjs";

const js = await load("run_columns");

test("an order of rows leaves the order of the experiments", () => {
  const rows = [
    { experiment: "new", name: "a", recall: 1 },
    { experiment: "old", name: "b", recall: 3 },
    { experiment: "new", name: "c", recall: 2 },
  ];
  const shown = js.sorted(rows, { value: ({ recall }) => recall }, true);
  const names = js.grouping(shown, true, rows).map(([experiment, members]) => [experiment, members.map(({ name }) => name)]);
  assert.deepEqual(names, [["new", ["c", "a"]], ["old", ["b"]]]);
  assert.deepEqual(js.grouping(shown, false, rows), [["", shown]]);
});
