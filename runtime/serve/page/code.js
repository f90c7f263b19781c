/** Colors in code: comments, strings, numbers and words that many languages keep for themselves. */

import { element } from "./dom.js";

const LONGEST = 50_000; // characters: more stays one color

const HASH = "#[^\\n]*";
const SLASHES = "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
const DASHES = "--[^\\n]*";
const COMMENTS = new Map();
for (const name of ["python", "py", "sh", "bash", "shell", "console", "yaml", "yml", "toml", "ruby", "rb", "perl", "r", "make", "makefile", "dockerfile", "ini"]) COMMENTS.set(name, HASH);
for (const name of ["javascript", "js", "jsx", "typescript", "ts", "tsx", "json", "c", "h", "cpp", "c++", "cc", "cuda", "java", "kotlin", "go", "rust", "rs", "swift", "scala", "csharp", "cs", "css", "zig"]) COMMENTS.set(name, SLASHES);
for (const name of ["sql", "lua", "haskell", "hs"]) COMMENTS.set(name, DASHES);
COMMENTS.set("php", `${HASH}|${SLASHES}`);

const LONG_STRINGS = `"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)`;
const STRINGS = `"(?:[^"\\\\\\n]|\\\\[^])*"?|'(?:[^'\\\\\\n]|\\\\[^])*'?|\`(?:[^\`\\\\]|\\\\[^])*\`?`;
const NUMBERS = "\\b\\d[\\w.]*\\b";
const WORDS = "[A-Za-z_$][\\w$]*";
const KEYWORDS = new Set(
  `abstract and as assert async await bool break case catch char class const continue def default defer del do
  double elif else end enum except export extends extern false False final finally float fn for foreach from func
  function global goto if impl implements import in instanceof int interface is lambda let long loop match mod
  module mut namespace new nil None nonlocal not null nullptr or package pass private protected pub public raise
  range return select self short signed sizeof static struct super switch template then this throw trait true True
  try type typedef typeof undefined union unless unsigned until use using var virtual void volatile when where while
  with yield SELECT FROM WHERE JOIN ON GROUP BY ORDER INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE AND OR NOT
  NULL AS LIMIT echo fi done esac local`.split(/\s+/),
);
const patterns = new Map();

function pattern(language) {
  if (!patterns.has(language)) {
    const groups = [["c", COMMENTS.get(language)], ["s", `${LONG_STRINGS}|${STRINGS}`], ["n", NUMBERS], ["w", WORDS]];
    patterns.set(language, new RegExp(groups.map(([name, part]) => `(?<${name}>${part})`).join("|"), "g"));
  }
  return patterns.get(language);
}

/** Nodes that together have the text. Code in a language that is not known here stays one text. */
export function highlighted(text, language) {
  if (!COMMENTS.has(language) || text.length > LONGEST) return [text];
  const nodes = [];
  let plain = 0; // where the text that is in no node yet begins
  for (const { 0: piece, index, groups } of text.matchAll(pattern(language))) {
    const kind = groups.c !== undefined ? "comment" : groups.s !== undefined ? "string" : groups.n !== undefined ? "number" : "keyword";
    if (kind === "keyword" && !KEYWORDS.has(piece)) continue;
    nodes.push(text.slice(plain, index), element("span", { class: kind }, piece));
    plain = index + piece.length;
  }
  return [...nodes, text.slice(plain)].filter((node) => node !== "");
}
