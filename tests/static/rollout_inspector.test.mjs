// The pure parts of the rollout inspector. `node --test tests/static`; tests/widgets/test_rollout_inspector.py compares them
// with the Python that computes the same.
import assert from "node:assert/strict";
import test from "node:test";
import { load } from "./load.mjs";

const js = await load("rollout_inspector");

const view = (array) => new DataView(array.buffer);
const STRINGS = ["", " for", "i", "\n", "In"];

/** Five rollouts of three tokens at two positions; the last rollout is one token short. */
function packed(changes = {}) {
  return {
    rows: 5,
    groups: 2,
    width: 3,
    prefix: 2,
    strings: STRINGS,
    tokens: view(Uint16Array.of(1, 2, 3, 1, 4, 3, 2, 2, 2, 4, 4, 4, 1, 2, 0)),
    targets: view(Uint16Array.of(1, 2, 3, 4, 2, 1)),
    prefixes: view(Uint16Array.of(0, 1, 2, 3)),
    group: view(Int32Array.of(0, 1, 0, 1, 0)),
    sample_index: view(Int32Array.of(0, 0, 1, 1, 2)),
    step: view(Int32Array.of(7, 3)),
    position: view(Int32Array.of(20, 30)),
    sequence_id: view(Float64Array.of(11, 12)),
    numbers: {
      entropy: view(Float32Array.of(2, 1, 2, 1, 2)),
      reward: view(Float32Array.of(0.5, NaN, -0.1, 0.7, 0.5)),
      advantage: view(Float32Array.of(1, 0, -1, 0, 1)),
      cosine: view(Float32Array.of(0.25, 0.5, NaN, 0.0625, 0.75)),
      binary: view(Float32Array.of(1, 0, 0, 0, 0.5)),
      logprob: view(Float32Array.of(-1, -2, -3, -4, -5)),
    },
    logprobs: view(new Float32Array(15)),
    cosines: null,
    ...changes,
  };
}
const data = js.unpackRollouts(packed());
const shown = (filters, sort = ["row", false]) => [...js.shownRows(data, filters, sort)];

test("rollouts of a position stand together, where the first of them stands", () => {
  assert.deepEqual(shown({}), [0, 2, 4, 1, 3]);
  assert.deepEqual(shown({}, ["step", false]), [1, 3, 0, 2, 4]);
  assert.deepEqual([...js.linesOf(data, js.shownRows(data, {}, ["row", false]))], [-1, 0, 2, 4, -2, 1, 3]);
  assert.deepEqual([...js.linesOf(data, Int32Array.of(3))], [-2, 3]);
});

test("a flat list is sorted over all positions, without references", () => {
  const rows = js.shownRows(data, { reward: [-0.1, null] }, ["reward", true], true);
  assert.deepEqual([...rows], [3, 0, 4, 2]);
  assert.deepEqual([...js.linesOf(data, rows, true)], [3, 0, 4, 2]);
});

test("hits are marked across tokens, whatever the case of ASCII letters", () => {
  // Rollout 0 is " for" "i" "\n", rollout 3 "In" "In" "In"; the reference of position 1 is "In" "i" " for".
  assert.deepEqual(js.hitsOf(data, data.tokens, 0, "RI"), [[[3, 4]], [[0, 1]], []]);
  assert.deepEqual(js.hitsOf(data, data.tokens, 3, "n"), [[[1, 2]], [[1, 2]], [[1, 2]]]);
  assert.deepEqual(js.hitsOf(data, data.targets, 1, "ni f"), [[[1, 2]], [[0, 1]], [[0, 2]]]);
  assert.deepEqual(js.hitsOf(data, data.tokens, 0, ""), [[], [], []]);
  const parts = [["·", true, false], ["f", false, false], ["or", false, true]];
  assert.deepEqual(js.markedParts(" for", [[2, 4]]), parts);
  assert.deepEqual(js.markedParts("\n\n", [[1, 2]]), [["⏎", true, false], ["⏎", true, true]]);
});

test("sorted by a value: what is none last, equal ones as they came", () => {
  assert.deepEqual(shown({}, ["reward", true]), [3, 1, 0, 4, 2]);
  assert.deepEqual(shown({}, ["reward", false]), [2, 0, 4, 3, 1]);
  assert.deepEqual(shown({}, ["row", true]), [4, 2, 0, 3, 1]);
  assert.deepEqual(shown({}, ["logprob", false]), [4, 2, 0, 3, 1]);
});

test("bounds are inside, rounded as the values are; what is no number passes open ranges only", () => {
  assert.deepEqual(shown({ reward: [0.7, null] }), [3]); // 0.7 is not a float32
  assert.deepEqual(shown({ reward: [-0.1, 0.5] }), [0, 2, 4]);
  assert.deepEqual(shown({ reward: [null, 1e39] }), [0, 2, 4, 3]);
  assert.deepEqual(shown({ step: [2.5, 3] }), [1, 3]);
  assert.deepEqual(shown({ reward: [1, 0] }), []);
});

test("text is looked for across tokens, ASCII capitals alike", () => {
  assert.deepEqual(shown({ text: " FORi" }), [0, 4, 1]); // " forIn" holds it too
  assert.deepEqual(shown({ text: "i\n" }), [0]);
  assert.deepEqual(shown({ target: "Ini" }), [1, 3]);
  assert.deepEqual(shown({ text: "in", target: "ini" }), [1, 3]);
});

test("nothing to show is no error", () => {
  const none = js.unpackRollouts({});
  assert.deepEqual([...js.shownRows(none, { text: "a", reward: [0, 1] }, ["reward", true])], []);
  assert.deepEqual(js.tableF1(none, []), []);
});

test("matches and lengths: a place without a token is none", () => {
  const pairs = [0, 1, 2, 3, 4].map((row) => [0, 1, 2].map((i) => js.isMatch(data, row, i)));
  assert.deepEqual(pairs, [[true, true, true], [false, false, false], [false, true, false], [true, false, false], [true, true, false]]);
  assert.equal(js.lengthOf(data, data.tokens, 4), 2);
  assert.equal(js.lengthOf(data, data.targets, 1), 3);
});

test("a token matches itself, whatever character it completes", () => {
  const added = { strings: [...STRINGS, "中", "文"], bases: [2, 2] };
  const whole = js.unpackRollouts(packed({ ...added, tokens: view(Uint16Array.of(5, 2, 3, ...Array(12).fill(1))), targets: view(Uint16Array.of(6, 1, 3, 1, 1, 1)) }));
  assert.deepEqual([0, 1, 2].map((i) => js.isMatch(whole, 0, i)), [true, false, true]);
});

test("the best of a position, where it has several", () => {
  assert.deepEqual([...js.bestRows(data, data.numbers.reward, Int32Array.of(0, 1, 2, 3, 4))], [0, 3]);
  assert.deepEqual([...js.bestRows(data, data.numbers.reward, Int32Array.of(0, 1))], [-1, -1]);
});

test("histogram counts what is finite; the highest value falls into the last part", () => {
  const { counts, mean, count } = js.histogram(Float32Array.of(0, 0.25, 0.5, 1, NaN), [0, 1, 2, 3, 4], 0, 1, 4);
  assert.deepEqual([counts, mean, count], [[1, 1, 1, 1], 0.4375, 4]);
});

test("what cannot be seen is shown, apart from what can", () => {
  assert.equal(js.visible(" a  b\n\t\u0000"), "·a··b⏎⇥\\u0000");
  assert.deepEqual(js.visibleParts(" a b  c "), [["·", true], ["a b", false], ["··", true], ["c", false], ["·", true]]);
  assert.deepEqual(js.visibleParts("\n x\u202e"), [["⏎", true], [" x", false], ["\\u202e", true]]);
  for (const text of ["", " ", "  ", "a ", "\r\n", "\u{1f468}\u200d\u{1f469}", "</script>", "e\u0301"]) {
    assert.equal(js.visibleParts(text).map(([part]) => part).join(""), js.visible(text));
  }
});

test("table F.1 and its Markdown", () => {
  const table = js.tableF1(data, js.shownRows(data, { reward: [0.7, null] }, ["row", false]));
  assert.deepEqual(table.map(({ type, text, value, best }) => [type, text, value, best]), [
    ["GT", "Ini for", "–", false],
    ["P1", "·forIn⏎", "0.500", true], // the rollouts of a position shown, each of them
    ["P2", "InInIn", "0.063", false],
  ]);
  const [, , , line] = js.markdownF1([{ example: "", type: "P1", text: "<b>|`*a*", value: "0.5", best: true }, ...table]).split("\n");
  assert.equal(line, "| Ex. 1 | GT | Ini for | – |");
  assert.ok(js.markdownF1([{ example: "", type: "P1", text: "<b>|`*a*", value: "0.5", best: true }]).includes("\\<b\\>\\|\\`\\*a\\* | **0.5** ★ |"));
});

test("the star of table F.1 is the highest of all rollouts, which is written where the first ones do not hold it", () => {
  const rows = js.shownRows(data, { step: [7, null] }, ["row", false]); // rollouts 0, 2 and 4, with cosines 0.25, none and 0.75
  const lines = (samples) => js.tableF1(data, rows, 6, samples).map(({ type, value, best }) => [type, value, best]);
  assert.deepEqual(lines(1), [["GT", "–", false], ["P1", "0.250", false], ["P3", "0.750", true]]);
  assert.deepEqual(lines(4), [["GT", "–", false], ["P1", "0.250", false], ["P2", "–", false], ["P3", "0.750", true]]);
});

test("a press on a head: highest first, lowest first, as they came", () => {
  const presses = ["reward", "reward", "reward", "step"];
  const orders = presses.map(((sort) => (name) => (sort = js.nextSort(sort, name)))(["row", false]));
  assert.deepEqual(orders, [["reward", true], ["reward", false], ["row", false], ["step", true]]);
});

test("100,000 rollouts are filtered and sorted quickly", () => {
  const rows = 100_000;
  const values = Float32Array.from({ length: rows }, (_, i) => Math.sin(i * 12.9898) * 43758.5453 % 1);
  const numbers = Object.fromEntries(["entropy", "reward", "advantage", "cosine", "binary", "logprob"].map((name) => [name, view(values)]));
  const big = js.unpackRollouts(packed({
    rows,
    groups: rows / 8,
    width: 5,
    tokens: view(Uint16Array.from({ length: rows * 5 }, (_, i) => 1 + ((i * 7919) >> 3) % 4)),
    targets: view(new Uint16Array((rows / 8) * 5).fill(1)),
    group: view(Int32Array.from({ length: rows }, (_, i) => i >> 3)),
    sample_index: view(new Int32Array(rows)),
    step: view(new Int32Array(rows / 8)),
    position: view(new Int32Array(rows / 8)),
    numbers,
  }));
  const times = [];
  for (const [filters, sort] of [[{}, "reward"], [{ reward: [0, null] }, "reward"], [{ text: "in" }, "entropy"], [{ target: "f" }, "row"]]) {
    const before = performance.now();
    const found = js.shownRows(big, filters, [sort, true]);
    times.push(performance.now() - before);
    assert.ok(found.length > 1000);
    if (sort === "reward") {
      const firsts = [...found.filter((row, i) => i === 0 || row >> 3 !== found[i - 1] >> 3)].map((row) => values[row]);
      assert.ok(firsts.every((value, i) => i === 0 || value <= firsts[i - 1]));
    }
  }
  assert.ok(Math.max(...times) < 1000, `${times}`); // about 30 ms on a quiet machine
});
