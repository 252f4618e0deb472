// The pure parts of the token map: cutting, rows, colours, search. `node --test tests/static`
import assert from "node:assert/strict";
import test from "node:test";
import { load } from "./load.mjs";

const [layout, colours, search, paint, panel, answers, picture] = await Promise.all(
  ["token_layout", "token_colours", "token_search", "token_paint", "token_panel", "token_alternatives", "token_picture"].map(load),
);
const { TEXT, SIGN, NEWLINE, EMPTY, BORDER } = layout;
const cells = (text, kind) => (kind === EMPTY ? 1 : kind === BORDER ? 2 : text.length);

function tokensOf(...parts) {
  const starts = [0];
  for (const part of parts) starts.push(starts[starts.length - 1] + part.length);
  return { text: parts.join(""), starts: Uint32Array.from(starts) };
}

function rowsOf(made) {
  return Array.from({ length: made.rows }, (_, row) => made.text.slice(made.rowStart[row], made.rowStart[row + 1]).join("|"));
}

const bytes = (array) => new DataView(array.buffer, array.byteOffset, array.byteLength);
const metricOf = (values, more = {}) => ({ values: Float32Array.from(values), low: 0, high: 1, diverging: false, log: false, ...more });

test("UTF-16 units come back as they were, lone surrogates too", () => {
  const text = `a\ud800${"x".repeat(20000)}\u{1f642}\0`;
  const units = Uint16Array.from({ length: text.length + 1 }, (_, i) => (i ? text.charCodeAt(i - 1) : 7));
  assert.equal(layout.textOf(new DataView(units.buffer, 2)), text); // a view into a larger buffer
});

test("what cannot be seen becomes a sign, and nothing else changes", () => {
  const shown = (text) => layout.partsOf(text).map((part) => part.text).join("|");
  assert.equal(shown("plain <b>"), "plain <b>");
  assert.equal(shown("a\0b"), "a|‹NUL›|b");
  assert.equal(shown("\x1b[31m"), "‹ESC›|[31m");
  assert.equal(shown("\ud800\udfff\ud800"), "\ud800\udfff|‹D800›");
  assert.equal(shown("a\u200bb\u202e\ufeff\u00ad"), "a|‹ZWSP›|b|‹RLO›|‹BOM›|‹SHY›");
  assert.equal(shown("\r\n\r\t"), "‹CR›↵|‹CR›|⇥");
  assert.equal(shown("\u0301x"), "◌\u0301x");
  assert.equal(shown("é日本"), "é日本");
  assert.equal(layout.visibleText("x".repeat(100), 5), "xxxxx…");
  assert.deepEqual(layout.partsOf("").map((part) => part.kind), [EMPTY]);
  assert.deepEqual(layout.partsOf("a\n\tb").map((part) => part.kind), [TEXT, NEWLINE, SIGN, TEXT]);
});

test("emoji joined inside a token stay joined, joiners alone are seen", () => {
  const family = "\u{1f468}\u200d\u{1f469}\u200d\u{1f467}";
  for (const whole of [family, "\u{1f44d}\u{1f3fd}", "1\ufe0f\u20e3", "\u2764\ufe0f\u200d\u{1f525}"]) {
    assert.deepEqual(layout.partsOf(whole).map((part) => part.text), [whole]);
  }
  assert.deepEqual(layout.partsOf("\u200d").map((part) => part.text), ["‹ZWJ›"]);
  assert.deepEqual(layout.partsOf("x\ufe0f").map((part) => part.text), ["x", "‹FE0F›"]);
});

test("rows break between words, at line ends, and in a word only where it fills the row", () => {
  const made = layout.layoutTokens(tokensOf("one", " two", " thr", "ee", "\n", "fo", "ur"), 10, cells);
  assert.deepEqual(rowsOf(made), ["one| two", " thr|ee|↵", "fo|ur"]);
  assert.deepEqual([...made.x], [0, 3, 0, 4, 6, 0, 2]);
  assert.deepEqual([...made.tokenPiece], [0, 1, 2, 3, 4, 5, 6, 7]);
  const word = layout.layoutTokens(tokensOf("aaaa", "bbbb", "cccc"), 10, cells);
  assert.deepEqual(rowsOf(word), ["aaaa|bbbb", "cccc"]);
  const long = layout.layoutTokens(tokensOf("x".repeat(25), "y"), 10, cells);
  assert.deepEqual(long.text.map((text) => text.length), [10, 10, 5, 1]);
  assert.deepEqual(rowsOf(long).length, 3);
});

test("a long token is never cut inside a character", () => {
  const made = layout.layoutTokens(tokensOf("\u{1f600}".repeat(50)), 7, cells);
  assert.equal(made.text.join(""), "\u{1f600}".repeat(50));
  for (const piece of made.text) assert.equal(/^[\udc00-\udfff]|[\ud800-\udbff]$/.test(piece), false);
  const tower = layout.layoutTokens(tokensOf(`Z${"\u0300".repeat(1000)}`), 7, cells);
  assert.equal(tower.text.join("").replaceAll("◌", ""), `Z${"\u0300".repeat(1000)}`);
});

test("empty tokens and borders have a place of their own", () => {
  const made = layout.layoutTokens(tokensOf("ab", "", "c", "\n\n", "d"), 10, cells, new Map([[2, 7]]));
  assert.deepEqual(made.kind, [TEXT, EMPTY, BORDER, TEXT, NEWLINE, NEWLINE, TEXT]);
  assert.deepEqual(rowsOf(made), ["ab||7|c|↵", "↵", "d"]);
  assert.equal(layout.pieceOf(made, 2), 3);
  assert.deepEqual(paint.rectsOf(made, 3), [{ row: 0, x: 6, width: 1 }, { row: 1, x: 0, width: 1 }]);
  assert.deepEqual([...paint.tokenRows(made)], [0, 0, 0, 0, 2]);
  assert.deepEqual([0, 2, 2.5, 4, 5.5, 99].map((x) => layout.tokenAt(made, 0, x)), [0, 1, 1, 2, 2, 3]);
  assert.equal(layout.tokenAt(made, 0, 99, true), -1);
  assert.equal(layout.tokenAt(made, 3, 0), -1);
  assert.equal(layout.layoutTokens(tokensOf(), 10, cells).rows, 0);
});

test("65,536 tokens are laid out in one pass over distinct texts", () => {
  const words = [" the", " state", "\n", " of", "x", " 12"];
  let asked = 0;
  const parts = Array.from({ length: 65536 }, (_, i) => words[(i * 7 + (i >> 3)) % words.length]);
  const made = layout.layoutTokens(tokensOf(...parts), 120, (text, kind) => (asked++, cells(text, kind)));
  assert.equal(asked, words.length);
  assert.equal(made.tokenPiece[65536], 65536);
  for (let piece = 0; piece < made.x.length; piece++) assert.ok(made.x[piece] + made.width[piece] <= 121);
});

test("every ground has an ink and a faint sign of contrast 4.5 at least", () => {
  for (const dark of [false, true]) {
    for (const diverging of [false, true]) {
      const ramp = colours.rampOf(dark, diverging);
      for (let level = 1; level < 256; level++) {
        assert.ok(colours.contrast(ramp.grounds[level], ramp.inks[level]) >= 4.5, ramp.grounds[level]);
        assert.ok(colours.contrast(ramp.grounds[level], ramp.faints[level]) >= 4.5, ramp.grounds[level]);
      }
    }
  }
  assert.equal(colours.contrast("#000000", "#ffffff"), 21);
  assert.equal(colours.mix("#123456", "#abcdef", 0), "#123456");
  assert.equal(colours.mix("#123456", "#abcdef", 1), "#abcdef");
});

test("sequential scales rise evenly in lightness: they can be read without hue", () => {
  for (const dark of [false, true]) {
    const { grounds } = colours.rampOf(dark, false);
    const light = grounds.slice(1).map((ground) => colours.contrast(ground, "#000000"));
    for (let i = 1; i < light.length; i++) assert.ok(dark ? light[i] >= light[i - 1] * 0.995 : light[i] <= light[i - 1] * 1.005, `${dark} ${i}`);
  }
});

test("shares and levels: ends, beyond, none, around 0, by logarithm", () => {
  const plain = metricOf([-1, 0, 0.5, 1, 9, NaN, Infinity, -Infinity]);
  assert.deepEqual([...colours.levelsOf(plain)], [1, 1, 128, 255, 255, 0, 255, 1]);
  const around = metricOf([-2, -1, 0, 2, 4], { low: -2, high: 4, diverging: true });
  assert.deepEqual([...around.values].map((value) => colours.shareOf(around, value)), [0, 0.25, 0.5, 0.75, 1]);
  const log = metricOf([1, 10, 100, 0], { low: 1, high: 100, log: true });
  assert.deepEqual([...log.values].map((value) => colours.shareOf(log, value)), [0, 0.5, 1, 0]);
});

test("the scale is labelled at its ends, and they say what lies beyond", () => {
  const labels = (metric) => panel.scaleLabels(metric).map(([, text]) => text);
  assert.deepEqual(labels(metricOf([], { high: 6.1234, above: true })), ["0", "2", "4", "≥ 6.12"]);
  assert.deepEqual(labels(metricOf([], { low: -2, high: 2, diverging: true, below: true })), ["≤ −2", "−1", "0", "1", "2"]);
  assert.deepEqual(labels(metricOf([], { low: 1, high: 1000, log: true })), ["1", "10", "100", "1,000"]);
});

test("labels of near-equal values have the digits that tell them apart, and none covers another", () => {
  const labels = (low, high, more) => panel.scaleLabels(metricOf([], { low, high, ...more })).map(([, text]) => text);
  assert.deepEqual(labels(2.41201, 2.41259), ["2.41201", "2.4122", "2.4124", "2.41259"]);
  assert.deepEqual(labels(-2.41259, -2.41201, { below: true }), ["≤ −2.41259", "−2.4124", "−2.4122", "−2.41201"]);
  assert.deepEqual(labels(1000.4, 1001.6), ["1,000.4", "1,001", "1,001.6"]);
  assert.deepEqual(labels(99.96, 100.04, { above: true }), ["99.96", "99.98", "100", "100.02", "≥ 100.04"]);
  assert.deepEqual(labels(1000.004, 1000.016), ["1,000.004", "1,000.01", "1,000.016"]);
  assert.deepEqual(labels(0, 1e-7), ["0", "5.00e−8", "1.00e−7"]);
});

test("a picture holds the whole document if it can, and else what follows the visible rows", () => {
  assert.deepEqual(picture.rowsInPicture(300, 7), { first: 0, stop: 300, scale: 2 });
  assert.deepEqual(picture.rowsInPicture(700, 7), { first: 0, stop: 700, scale: 1 });
  assert.deepEqual(picture.rowsInPicture(2000, 7), { first: 7, stop: 730, scale: 1 });
  assert.deepEqual(picture.rowsInPicture(2000, 1900), { first: 1277, stop: 2000, scale: 1 });
});

test("the highest come first, farthest from 0 where the metric diverges, none without a value", () => {
  assert.deepEqual(colours.highestTokens(metricOf([0.2, NaN, 0.9, 0.5, 0.9]), 3), [2, 4, 3]);
  assert.deepEqual(colours.highestTokens(metricOf([-3, 1, NaN, 2], { diverging: true }), 2), [0, 3]);
  assert.deepEqual(colours.highestTokens(null), []);
});

test("the profile has the mean and the extreme of each strip", () => {
  const { mean, most } = paint.profileOf(metricOf([0, 0.5, 1, NaN]), Uint32Array.from([0, 0, 1, 2]), 3, 3);
  assert.deepEqual([...mean], [0.25, 1, NaN]);
  assert.deepEqual([...most], [0.5, 1, NaN]);
  const around = metricOf([-1, 0.5], { low: -1, high: 1, diverging: true });
  assert.deepEqual([...paint.profileOf(around, Uint32Array.from([0, 0]), 1, 1).most], [0]);
});

test("search is by text as it stands, over tokens, and knows no patterns", () => {
  const tokens = tokensOf("A.b", "", "", "c a", ".", "B\u{1f642}");
  assert.deepEqual(search.findAll(tokens.text, "a.b"), [[0, 3], [5, 8]]);
  assert.deepEqual(search.hitTokens(tokens.starts, search.findAll(tokens.text, "a.b")), [[0, 0], [3, 5]]);
  assert.deepEqual(search.findAll(tokens.text, ".*"), []);
  assert.deepEqual(search.findAll(tokens.text, ""), []);
  assert.deepEqual(search.findAll("İİ x", "X"), [[3, 4]]); // lower case would be longer
  assert.equal(search.findAll("aaaa", "a", 3).length, 3);
  assert.deepEqual(search.findAll("a\ud800b", "\ud800"), [[1, 2]]);
  for (const query of "\\^$.*+?()[]{}|/-") assert.equal(search.findAll(`x${query}`, query).length, 1, query);
});

test("what is copied: tokens of a range, or the line", () => {
  const tokens = tokensOf("one", " two", "\n", "three", "\nfour");
  assert.equal(search.textOfRange(tokens, 1, 3), " two\nthree");
  assert.deepEqual([0, 1, 2, 3, 4].map((token) => search.lineOf(tokens, token)), ["one two", "one two", "one two", "three", "three"]);
  assert.equal(search.lineOf(tokensOf(""), 0), "");
});

test("alternatives are read from arrays, and asked for where they are lazy", async () => {
  const packed = { width: 2, index: bytes(Uint32Array.from([0, 1, 1, 0])), probabilities: bytes(Float32Array.from([0.5, 0.25, 0.75, NaN])) };
  Object.assign(packed, { text: bytes(Uint16Array.from([97, 98, 99])), offsets: bytes(Uint32Array.from([0, 1, 3])) });
  const here = new answers.Answers({}, { key: 1, total: 2, alternatives: packed }, () => {});
  assert.deepEqual([here.of(0), here.of(1)], [[["a", 0.5], ["bc", 0.25]], [["bc", 0.75]]]);
  const none = new answers.Answers({}, { key: 1, total: 2, alternatives: null }, () => {});
  assert.equal(none.of(0), undefined);
  const sent = [];
  const answered = [];
  const lazy = new answers.Answers({ send: (message) => sent.push(message) }, { key: 4, total: 9, alternatives: { lazy: true } }, (token) => answered.push(token));
  assert.deepEqual([lazy.of(3), lazy.of(7)], [null, null]);
  await new Promise((done) => setTimeout(done, 80));
  assert.deepEqual(sent, [{ ask: [7], document: 4 }]); // the pointer rested there
  const names = ["index", "probabilities", "text", "offsets"];
  const answer = { tokens: [7, 3], width: 2, names };
  lazy.receive({ alternatives: { ...answer, document: 5 } }, names.map((name) => packed[name]));
  assert.deepEqual(answered, []);
  lazy.receive({ alternatives: { ...answer, document: 4 } }, names.map((name) => packed[name]));
  assert.deepEqual([answered, lazy.of(3)], [[7, 3], [["bc", 0.75]]]);
});
