// The pure parts of widgets/static/live_curves.js. `node --test tests/static`
import assert from "node:assert/strict";
import test from "node:test";
import { load } from "./load.mjs";

const js = await load("live_curves");

test("ticks are round and inside", () => {
  assert.deepEqual(js.ticks(0, 10, 4), [0, 5, 10]);
  assert.deepEqual(js.ticks(0.12, 0.31, 4), [0.15, 0.2, 0.25, 0.3]);
  assert.deepEqual(js.ticks(-1, 1, 4), [-1, -0.5, 0, 0.5, 1]);
});

test("extent skips what is not finite and widens a single value", () => {
  assert.deepEqual(js.extent([[3, NaN, 1], [Infinity, 2]]), [1, 3]);
  assert.equal(js.extent([[NaN]]), null);
  const [low, high] = js.extent([[0]], 0.06);
  assert.ok(low < 0 && high > 0);
});

test("nearest finds the closer neighbour", () => {
  const xs = [1, 2, 4, 8];
  assert.deepEqual([0, 2.9, 3.1, 7, 99].map((x) => js.nearest(xs, x)), [0, 1, 2, 3, 3]);
});

test("numbers and durations read well", () => {
  assert.equal(js.format(2.34567), "2.346");
  assert.equal(js.format(0), "0");
  assert.equal(js.format(0.00001234), "1.23e-5");
  assert.equal(js.format(12345), "12,345");
  assert.equal(js.format(12345.678), "12,350");
  assert.equal(js.format(NaN), "not finite");
  assert.equal(js.duration(5), "5 s");
  assert.equal(js.duration(75), "1 min 15 s");
  assert.equal(js.duration(7320), "2 h 2 min");
});

test("a gap lifts the pen", () => {
  const same = (value) => value;
  assert.equal(js.linePath([0, 1, 2, 3], [5, NaN, 7, 8], same, same), "M0.0 5.0M2.0 7.0L3.0 8.0");
  assert.equal(js.bandPath([0, 1], [1, 2], [3, 4], same, same), "M0.0 3.0L1.0 4.0L1.0 2.0L0.0 1.0Z");
  assert.equal(js.bandPath([0, 1], [1, NaN], [3, 4], same, same), "");
});

test("marks: every evaluation, a few of many steps, the last always", () => {
  assert.deepEqual(js.marked(3, true), [2, 1, 0]);
  assert.equal(js.marked(1000, false).length, 5);
  assert.equal(js.marked(1000, false)[0], 999);
  assert.deepEqual(js.marked(0, true), []);
});

test("floats are read from a view into a larger buffer", () => {
  const bytes = new Uint8Array(13);
  new DataView(bytes.buffer).setFloat32(5, 1.5, true);
  assert.deepEqual([...js.floats(new DataView(bytes.buffer, 5, 8))], [1.5, 0]);
});

test("readings give mean and range of a method's runs", () => {
  const [sft, refine] = [{ label: "SFT" }, { label: "REFINE" }];
  const line = (method, y) => ({ method, x: [1, 2, 3], y });
  const panel = { lines: [line(sft, [1, 2, 3]), line(sft, [3, 4, 5]), line(refine, [7, 8, 9])] };
  assert.deepEqual(js.readings(panel, null).map((r) => r.text), ["4 (3–5)", "9"]);
  assert.deepEqual(js.readings(panel, 1.2).map((r) => r.text), ["2 (1–3)", "7"]);
  assert.deepEqual(js.readings(panel, 4), []); // no run has come so far
});

test("readings of methods have as many digits as they need to differ, the same for all of them", () => {
  const texts = (values) => js.readings({ lines: values.map((y) => ({ method: {}, x: [1], y: [y] })) }, null).map((r) => r.text);
  assert.deepEqual(texts([2.28003, 2.28041]), ["2.2800", "2.2804"]); // not 2.28 and 2.28
  assert.deepEqual(texts([2.28, 2.2804]), ["2.2800", "2.2804"]);
  assert.deepEqual(texts([2.25, 1.5, 12.125]), ["2.250", "1.500", "12.13"]);
  assert.deepEqual(texts([2.2800001, 2.2800002]), ["2.28", "2.28"]); // equal to 5 digits
  assert.deepEqual(texts([0.25, 0.5]), ["0.25", "0.50"]);
  assert.deepEqual(texts([0, 0.0004, 3000]), ["0", "4.00e-4", "3,000"]);
  assert.deepEqual(texts([12_345, 1]), ["12,345", "1"]);
  assert.deepEqual(texts([0.5, NaN]), ["0.5", "not finite"]);
});

test("readings are of one step: a run that has not made it does not count, and that is said", () => {
  const [method, other] = [{ label: "REFINE, lr 0.001" }, { label: "REFINE, lr 0.01" }];
  const panel = { lines: [{ method, x: [1, 2, 3], y: [1, 2, 3] }, { method, x: [1], y: [9] }, { method: other, x: [1, 2], y: [5, 6] }] };
  assert.deepEqual(js.readings(panel, null).map((r) => r.text), ["3, 1 of 2 seeds", "6"]); // not (3 + 9) / 2
  assert.deepEqual(js.readings(panel, 1).map((r) => r.text), ["5 (1–9)", "5"]);
  const evaluated = { lines: [{ method, x: [0, 4, 8], y: [1, 2, 3] }, { method, x: [0, 6], y: [5, 7] }] };
  assert.deepEqual(js.readings(evaluated, 5).map((r) => r.text), ["2, 1 of 2 seeds"]);
  assert.deepEqual(js.readings(evaluated, 0).map((r) => r.text), ["3 (1–5)"]);
});

test("panels over tokens keep their steps where a run has none", () => {
  const [training, prompts] = [{ axis: "step", lines: [{ x: [1, 2], tokens: [96, 192] }] }, { axis: "prompt", lines: [{ x: [1], tokens: null }] }];
  const [moved, kept] = js.along([training, prompts], "tokens");
  assert.deepEqual([moved.axis, moved.lines[0].x, kept.axis, kept.lines[0].x], ["tokens", [96, 192], "prompt", [1]]);
  assert.equal(js.along([training], "step")[0], training);
});

test("readings over time take the nearest point of each run that is under way", () => {
  const method = { label: "SFT" };
  const panel = { apart: true, lines: [{ method, x: [0, 10, 20], y: [5, 4, 3] }, { method, x: [0, 15], y: [7, 6] }] };
  assert.deepEqual(js.readings(panel, 11).map((r) => r.text), ["5 (4–6)"]);
  assert.deepEqual(js.readings(panel, 19).map((r) => r.text), ["3, 1 of 2 seeds"]);
  assert.deepEqual(js.readings(panel, null).map((r) => r.text), ["4.5 (3.0–6.0)"]);
  assert.deepEqual(js.readings(panel, 30), []);
});

test("ticks have as many decimals as it takes for them to differ", () => {
  assert.deepEqual(js.tickTexts([0, 5, 10]), ["0", "5", "10"]);
  assert.deepEqual(js.tickTexts([2.412, 2.4122, 2.4124]), ["2.4120", "2.4122", "2.4124"]);
  assert.deepEqual(js.tickTexts(js.ticks(1.57548, 1.57652, 4)), ["1.5755", "1.5760", "1.5765"]); // not 1.575, 1.576, 1.577
  assert.deepEqual(js.tickTexts([1_000_000.5, 1_000_001]), ["1,000,000.5", "1,000,001.0"]);
  assert.deepEqual(js.tickTexts([0.0002, 0.0004]), ["2.00e-4", "4.00e-4"]);
});
