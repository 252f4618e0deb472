// The pure parts of widgets/static/reward_summary.js. `node --test tests/static`
import assert from "node:assert/strict";
import test from "node:test";
import { load } from "./load.mjs";

const js = await load("reward_summary");
const bytes = (...values) => new DataView(Uint8Array.from(values).buffer);

test("a rollout is shown, left out by the list, or of a clicked position", () => {
  const apart = bytes(0, 0, 1, 1);
  assert.deepEqual(js.kindsOf(apart, bytes(1, 0, 1, 0)), ["shown", "left-out", "clicked", null]);
  assert.deepEqual(js.kindsOf(apart, bytes()), ["shown", "shown", "clicked", "clicked"]); // no filter
  assert.deepEqual(js.kindsOf(apart, bytes(1, 0)), ["shown", "shown", "clicked", "clicked"]); // of other rollouts
});

test("bins as numpy has them: the last edge belongs to the last bin", () => {
  const values = [0, 0.5, 0.99, 1, 2, NaN, 3];
  assert.deepEqual(js.counted(values, [0, 1, 2], () => true), [3, 2]);
  assert.deepEqual(js.counted(values, [0, 1, 2], (row) => row !== 3), [3, 1]);
});

test("it is said what the numbers are of", () => {
  const facts = { rollouts: 2, positions: 1 };
  assert.equal(js.sentences(facts, ["shown", "shown"]), "Statistics over 2 rollouts at 1 sampled position.");
  assert.equal(
    js.sentences({ ...facts, positions: 2 }, ["shown", "left-out", "clicked", null]),
    "Statistics over 2 rollouts at 2 sampled positions. Pale: 1 rollout hidden by the list's filters. Orange: 1 rollout at clicked positions, excluded from the statistics.",
  );
});
