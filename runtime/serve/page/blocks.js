/** Markdown's blocks: which lines are a paragraph, a list, code. Plain data, no elements.
 *
 * What models write: CommonMark without HTML, link definitions and underlined headings, with tables. Every line
 * is looked at a bounded number of times, since an answer that grows is read again and again.
 */

const DEPTH = 8; // of quotes and lists in one another; what is deeper is text
const FENCE = /^( {0,3})(?:(`{3,})([^`]*)|(~{3,})(.*))$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const RULE = /^(-{3,}|\*{3,}|_{3,})$/;
const DELIMITERS = /^[ \t|:-]+$/;

/** Blocks of a text: objects with a `kind` and what that kind has. Quotes and items hold blocks again. */
export function blocks(text) {
  return readAll(text.split(/\r\n|\n|\r/), 0).found;
}

/** The blocks of some lines, and whether blank lines part any two of them. */
function readAll(lines, depth) {
  const found = [];
  let parted = false;
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    parted ||= found.length > 0 && isBlank(lines[at - 1]);
    const [block, next] = readBlock(lines, at, depth);
    found.push(block);
    at = next;
  }
  return { found, parted };
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return readFence(lines, at);
  if (indent(line) >= 4) return readIndented(lines, at);
  if (HEADING.test(line)) return [heading(line), at + 1];
  if (isRule(line)) return [{ kind: "rule" }, at + 1];
  if (depth < DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < DEPTH && ITEM.test(line)) return readList(lines, at, depth);
  if (startsTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

const isBlank = (line) => line.trim() === "";
const isRule = (line) => indent(line) < 4 && RULE.test(line.replace(/[ \t]/g, ""));

function indent(line) {
  let columns = 0;
  for (const character of line) {
    if (character === " ") columns += 1;
    else if (character === "\t") columns += 4 - (columns % 4);
    else break;
  }
  return columns;
}

/** A line without its first `columns` columns of space, or without those that it has. */
function dedent(line, columns) {
  let at = 0;
  let seen = 0;
  while (seen < columns && (line[at] === " " || line[at] === "\t")) {
    seen += line[at] === " " ? 1 : 4 - (seen % 4);
    at += 1;
  }
  return " ".repeat(Math.max(0, seen - columns)) + line.slice(at);
}

function readFence(lines, at) {
  const [, space, ticks, ticksInfo, tildes, tildesInfo] = FENCE.exec(lines[at]);
  const [fence, info] = [ticks ?? tildes, ticksInfo ?? tildesInfo];
  const code = [];
  let next = at + 1;
  for (; next < lines.length; next++) {
    const bare = lines[next].trim();
    if (bare.length >= fence.length && bare === fence[0].repeat(bare.length) && indent(lines[next]) < 4) {
      return [{ kind: "code", language: language(info), text: code.join("\n") }, next + 1];
    }
    code.push(dedent(lines[next], space.length));
  }
  return [{ kind: "code", language: language(info), text: code.join("\n") }, next]; // still being written
}

const language = (info) => info.trim().split(/\s/, 1)[0].toLowerCase();

function readIndented(lines, at) {
  const code = [];
  let next = at;
  while (next < lines.length && (isBlank(lines[next]) || indent(lines[next]) >= 4)) {
    code.push(dedent(lines[next], 4));
    next += 1;
  }
  while (code.length && isBlank(code.at(-1))) code.pop();
  return [{ kind: "code", language: "", text: code.join("\n") }, next];
}

function heading(line) {
  const [marker, hashes] = HEADING.exec(line);
  let text = line.slice(marker.length).trim();
  const closing = text.lastIndexOf(" ");
  const last = text.slice(closing + 1);
  if (last !== "" && last === "#".repeat(last.length)) text = closing < 0 ? "" : text.slice(0, closing).trimEnd();
  return { kind: "heading", level: hashes.length, text };
}

function readQuote(lines, at, depth) {
  const inner = [];
  let next = at;
  let fenced = false;
  for (; next < lines.length; next++) {
    const line = lines[next];
    if (!QUOTE.test(line) && (fenced || !goesOn(line, inner.at(-1)))) break;
    inner.push(line.replace(QUOTE, ""));
    fenced = fenced !== FENCE.test(inner.at(-1));
  }
  return [{ kind: "quote", blocks: readAll(inner, depth + 1).found }, next];
}

function readList(lines, at, depth) {
  const [, , marker] = ITEM.exec(lines[at]);
  const kind = marker.at(-1); // "-", "*", "+", "." or ")": another one begins another list
  const items = [];
  let loose = false;
  let next = at;
  while (next < lines.length) {
    const found = ITEM.exec(lines[next]);
    if (!found || found[2].at(-1) !== kind || isRule(lines[next])) break;
    const [item, end, blankAfter] = readItem(lines, next, found);
    const inner = readAll(item, depth + 1);
    items.push(inner.found);
    loose ||= inner.parted;
    next = end;
    if (blankAfter && next < lines.length && ITEM.exec(lines[next])?.[2].at(-1) === kind) loose = true;
  }
  const start = kind === "." || kind === ")" ? Number.parseInt(marker, 10) : null;
  return [{ kind: "list", start, loose, items }, next];
}

/** An item's lines, where the next block begins, and whether a blank line came before that. */
function readItem(lines, at, found) {
  const width = found[3].length > 4 || found[3] === "" ? found[0].trimEnd().length + 1 : found[0].length;
  const nested = found[1].length + Math.min(width - found[1].length, 2); // models indent by two, whatever the marker
  const item = [lines[at].slice(Math.min(width, lines[at].length))];
  let next = at + 1;
  let blank = false;
  let fenced = FENCE.test(item[0]); // between the fences of code
  for (; next < lines.length; next++) {
    const line = lines[next];
    if (isBlank(line)) {
      blank = true;
      item.push("");
    } else if (indent(line) >= nested) {
      item.push(dedent(line, width));
      fenced = fenced !== FENCE.test(item.at(-1));
      blank = false;
    } else if (!blank && !fenced && !ITEM.test(line) && goesOn(line, item.at(-1))) {
      item.push(line);
    } else break;
  }
  while (item.length > 1 && item.at(-1) === "") item.pop();
  return [item, next, blank];
}

/** Whether a line without the marks of its quote or item goes on with the paragraph that the line before ends. */
function goesOn(line, before) {
  return !isBlank(line) && !interrupts(line) && !isBlank(before) && !HEADING.test(before) && !isRule(before);
}

/** Whether a line begins a block even where a paragraph could go on. A year and a full stop begin no list. */
function interrupts(line) {
  if (FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || isRule(line)) return true;
  const item = ITEM.exec(line);
  return item !== null && item[3] !== "" && (item[2].length === 1 || item[2].slice(0, -1) === "1");
}

function startsTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|")) return false;
  const below = lines[at + 1];
  return DELIMITERS.test(below) && below.includes("-") && below.includes("|") && cells(below).length === cells(lines[at]).length;
}

function readTable(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return left && right ? "center" : right ? "right" : left ? "left" : null;
  });
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && !isBlank(lines[next]) && lines[next].includes("|"); next++) {
    const row = cells(lines[next]).slice(0, head.length);
    rows.push([...row, ...Array(head.length - row.length).fill("")]);
  }
  return [{ kind: "table", align, head, rows }, next];
}

/** The cells of a table's line. `\|` is a bar in a cell. */
function cells(line) {
  const found = [""];
  for (let i = 0; i < line.length; i++) {
    if (line[i] === "\\" && line[i + 1] === "|") found[found.length - 1] += line[++i];
    else if (line[i] === "|") found.push("");
    else found[found.length - 1] += line[i];
  }
  if (found.length > 1 && isBlank(found[0])) found.shift();
  if (found.length > 1 && isBlank(found.at(-1))) found.pop();
  return found.map((cell) => cell.trim());
}

function readParagraph(lines, at, depth) {
  let next = at + 1;
  while (next < lines.length && !isBlank(lines[next]) && !startsTable(lines, next)) {
    if (depth < DEPTH && interrupts(lines[next])) break;
    next += 1;
  }
  return [{ kind: "paragraph", text: lines.slice(at, next).map((line) => line.trimStart()).join("\n").trimEnd() }, next];
}
