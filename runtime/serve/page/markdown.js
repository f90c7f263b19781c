/** Markdown as elements, kept up to date while the text grows. */

import { blocks } from "./blocks.js";
import { highlighted } from "./code.js";
import { copyButton, element } from "./dom.js";
import { inline } from "./inline.js";

const shown = new WeakMap(); // what a target shows: for each of its children, the block it was made from

/** Make `target` show a text. Children whose blocks have not changed stay, and with them what is selected. */
export function showMarkdown(target, text) {
  const found = blocks(text);
  const now = found.map((block) => JSON.stringify(block));
  const before = shown.get(target) ?? [];
  let same = 0;
  while (same < now.length && now[same] === before[same]) same += 1;
  while (target.childNodes.length > same) target.lastChild.remove();
  target.append(...found.slice(same).map(made));
  shown.set(target, now);
}

/** Make `target` show a text as it is. */
export function showPlain(target, text) {
  shown.delete(target);
  target.replaceChildren(element("div", { class: "plain" }, text));
}

function made(block) {
  switch (block.kind) {
    case "code":
      return code(block);
    case "heading": // the page has headings of its own above these
      return element(`h${Math.min(6, block.level + 2)}`, {}, ...inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(made));
    case "list":
      return list(block);
    case "table":
      return table(block);
    default:
      return element("p", {}, ...inline(block.text));
  }
}

function code({ language, text }) {
  const bar = element("div", { class: "bar" }, element("span", {}, language), copyButton(() => text));
  const body = element("code", {}, ...highlighted(text, language));
  return element("div", { class: "code" }, bar, element("pre", { tabindex: "0" }, body));
}

function list({ start, loose, items }) {
  const entries = items.map((item) => element("li", {}, ...item.map(made)));
  const attributes = { class: loose ? null : "tight", start: start === null || start === 1 ? null : start };
  return element(start === null ? "ul" : "ol", attributes, ...entries);
}

function table({ align, head, rows }) {
  const row = (tag, texts) =>
    element("tr", {}, ...texts.map((text, i) => element(tag, { class: align[i] }, ...inline(text))));
  const body = rows.length > 0 && element("tbody", {}, ...rows.map((texts) => row("td", texts)));
  const grid = element("table", {}, element("thead", {}, row("th", head)), body);
  return element("div", { class: "table", tabindex: "0" }, grid);
}
