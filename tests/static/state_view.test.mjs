// The pure parts of widgets/static/state_view.js. `node --test tests/static`
import assert from "node:assert/strict";
import test from "node:test";
import { load } from "./load.mjs";

const js = await load("state_view");

test("a share of the width falls on a place", () => {
  assert.deepEqual([-0.1, 0, 0.24, 0.25, 0.99, 1].map((share) => js.placeAt(share, 4)), [0, 0, 0, 1, 3, 3]);
});

test("peaks keep the highest of every stretch", () => {
  assert.deepEqual([...js.peaks([1, 5, 2, 3, 9, 4], 3)], [5, 3, 9]);
  assert.deepEqual([...js.peaks([1, 5], 2)], [1, 5]);
});
