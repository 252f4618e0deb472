// A widget's module as the page gets it, with the modules that it imports inlined (`widgets.core.assets.script`).
import { readFileSync } from "node:fs";

function inlined(name, done) {
  if (done.has(name)) return "";
  done.add(name);
  const text = readFileSync(new URL(`../../widgets/static/${name}.js`, import.meta.url), "utf8");
  return text.replace(/^import \{[^}]*\} from "\.\/(\w+)\.js";\n/gm, (_, other) => inlined(other, done));
}

export function load(name) {
  const source = inlined(name, new Set());
  return import(`data:text/javascript;base64,${Buffer.from(source).toString("base64")}`);
}
