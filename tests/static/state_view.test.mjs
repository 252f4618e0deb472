// The pure parts of widgets/static/state_view.js. `node --test tests/static`
import assert from "node:assert/strict";
import test from "node:test";
import { load } from "./load.mjs";

const js = await load("state_view");

test("a share of the width falls on a place", () => {
  assert.deepEqual([-0.1, 0, 0.24, 0.25, 0.99, 1].map((share) => js.placeAt(share, 4)), [0, 0, 0, 1, 3, 3]);
});

test("spans keep the highest and the mean of every stretch", () => {
  const { highest, means } = js.spans(Float32Array.of(1, 5, 2, 3, 9, 4), 3);
  assert.deepEqual([[...highest], [...means]], [[5, 3, 9], [3, 2.5, 6.5]]);
  assert.deepEqual([...js.spans(Float32Array.of(1, 5), 2).means], [1, 5]);
});

test("bars have a gap between them, and are no solid block", () => {
  assert.deepEqual([100, 1613].map((count) => js.barsIn(870, count)), [100, 217]);
  assert.equal(js.barsIn(2, 9), 1);
});

test("an axis begins at 0 unless that hides how the values differ", () => {
  assert.deepEqual(js.axisOf([0, 0.5, 3]), [0, 3]);
  assert.deepEqual(js.axisOf([0.75, 0.875, 1]).map((end) => Number(end.toFixed(4))), [0.73, 1]);
  assert.deepEqual(js.axisOf([1, 1]), [0, 1]); // all alike: bars of full height say so
  assert.deepEqual(js.axisOf([0, 0]), [0, 1]);
});
