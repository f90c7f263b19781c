/** What is inside a paragraph: emphasis, code, links, line breaks. Gives nodes, never markup.
 *
 * One pass with a stack of what is open. What closes nothing stays text. The stack is bounded, and nodes move a
 * bounded number of times, so a text of ten thousand asterisks costs no more than any other of that length.
 */

import { element } from "./dom.js";

const DEPTH = 24; // of emphasis and brackets in one another; what is deeper is text
const LINK_LENGTH = 2000; // of an address
const SPECIAL = /[\\`*_~[\]!<\n]|https?:\/\//g;
const ESCAPED = /^[!-/:-@[-`{-~]$/;
const BARE_LINK = /https?:\/\/[^\s<>"`]{1,2000}/y;
const ANGLE_LINK = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/y;
const SPACE = /^\s?$/u; // the edge of the text counts as space
const PUNCTUATION = /^[\p{P}\p{S}]$/u;

export function inline(text) {
  return new Inline(text).read();
}

/** An address that a link may have, or null. */
export function safeAddress(address) {
  try {
    const url = new URL(address);
    return ["https:", "http:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null; // relative ones too: they would lead into this server
  }
}

function link(address, children) {
  const attributes = { href: address, title: address, target: "_blank", rel: "noopener noreferrer nofollow" };
  return element("a", attributes, ...children);
}

class Inline {
  #text;
  #at = 0;
  #frames = [{ mark: "", size: 0, children: [] }]; // the first holds the result
  #ticks = null; // where runs of backticks are, by their length

  constructor(text) {
    this.#text = text;
  }

  read() {
    while (this.#at < this.#text.length) {
      SPECIAL.lastIndex = this.#at;
      const found = SPECIAL.exec(this.#text);
      const end = found ? found.index : this.#text.length;
      this.#put(this.#text.slice(this.#at, end));
      this.#at = end;
      if (found) this.#readSpecial(this.#text[end]);
    }
    this.#dissolve(0);
    return this.#frames[0].children;
  }

  #readSpecial(character) {
    if (character === "\\") this.#readEscape();
    else if (character === "`") this.#readCode();
    else if (character === "\n") this.#readBreak();
    else if (character === "[") this.#open("[", 1);
    else if (character === "!") this.#readImage();
    else if (character === "]") this.#closeBracket();
    else if (character === "<") this.#readLink(ANGLE_LINK, 1);
    else if (character === "h") this.#readLink(BARE_LINK, 0);
    else this.#readMarks(character);
  }

  /** Add text or a node to what is open last. Texts that meet become one. */
  #put(child, frame = this.#frames.at(-1)) {
    if (child === "") return;
    const last = frame.children.at(-1);
    if (typeof child === "string" && typeof last === "string") frame.children[frame.children.length - 1] = last + child;
    else frame.children.push(child);
  }

  #literal(length) {
    this.#put(this.#text.slice(this.#at, this.#at + length));
    this.#at += length;
  }

  #open(mark, size, literal = mark.repeat(size), run = null) {
    if (this.#frames.length > DEPTH) this.#put(literal);
    else this.#frames.push({ mark, size, literal, run, children: [] });
    this.#at += literal.length;
  }

  /** What was opened above frame `index` is text after all. */
  #dissolve(index) {
    for (const frame of this.#frames.splice(index + 1)) {
      this.#put(frame.literal);
      for (const child of frame.children) this.#put(child);
    }
  }

  #readEscape() {
    const next = this.#text[this.#at + 1] ?? "";
    if (next === "\n") {
      this.#at += 1;
      this.#break();
    } else if (ESCAPED.test(next)) {
      this.#put(next);
      this.#at += 2;
    } else this.#literal(1);
  }

  /** A line's end is a break: whoever writes a poem or a log means its lines. */
  #readBreak() {
    const children = this.#frames.at(-1).children;
    if (typeof children.at(-1) === "string") children.push(children.pop().replace(/ {1,99}$/, ""));
    this.#break();
  }

  #break() {
    this.#put(element("br"));
    this.#at += 1;
    while (this.#text[this.#at] === " ") this.#at += 1;
  }

  #run(character) {
    let end = this.#at;
    while (this.#text[end] === character) end += 1;
    return end - this.#at;
  }

  #readCode() {
    const length = this.#run("`");
    const begin = this.#at + length;
    const end = this.#closingTicks(length, begin);
    if (end === null) return this.#literal(length);
    let code = this.#text.slice(begin, end).replaceAll("\n", " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "") code = code.slice(1, -1);
    this.#put(element("code", {}, code));
    this.#at = end + length;
  }

  #closingTicks(length, from) {
    if (this.#ticks === null) {
      this.#ticks = new Map();
      for (const { 0: run, index } of this.#text.matchAll(/`+/g)) {
        if (!this.#ticks.has(run.length)) this.#ticks.set(run.length, []);
        this.#ticks.get(run.length).push(index);
      }
      for (const places of this.#ticks.values()) places.reverse();
    }
    const places = this.#ticks.get(length) ?? [];
    while (places.length && places.at(-1) < from) places.pop(); // reading never goes back
    return places.at(-1) ?? null;
  }

  /** An image is not loaded: it becomes a link to it. */
  #readImage() {
    if (this.#text[this.#at + 1] === "[") this.#open("[", 1, "![");
    else this.#literal(1);
  }

  #closeBracket() {
    const index = this.#frames.findLastIndex((frame) => frame.mark === "[");
    if (index < 0) return this.#literal(1);
    const frame = this.#frames[index];
    const target = this.#target(this.#at + 1);
    const address = target && !frame.spent ? safeAddress(target.address) : null;
    if (address === null) {
      this.#frames.splice(index, 1); // the bracket is text; what was opened inside it stays open
      this.#put(frame.literal, this.#frames[index - 1]);
      for (const child of frame.children) this.#put(child, this.#frames[index - 1]);
      return this.#literal(1);
    }
    this.#dissolve(index);
    this.#frames.pop();
    this.#put(link(address, unlinked(frame.children)));
    if (frame.literal === "[") for (const outer of this.#frames) outer.spent = true; // no link in a link
    this.#at = target.end;
  }

  /** The address in `(address "title")` from `at` on, and where that ends; or null. */
  #target(at) {
    const text = this.#text;
    if (text[at] !== "(") return null;
    let depth = 0;
    let end = at + 1;
    for (const last = end + LINK_LENGTH; ; end++) {
      if (end >= text.length || end > last || text[end] === "\n") return null;
      if (text[end] === "(") depth += 1;
      else if (text[end] === ")" && depth-- === 0) break;
    }
    const inside = text.slice(at + 1, end).trim();
    const address = /^(?:<([^<>]*)>|(\S*))(?:\s+(?:"[^"]*"|'[^']*'))?$/.exec(inside);
    return address && { address: address[1] ?? address[2], end: end + 1 };
  }

  /** A link whose text is its address. `margin` characters around it are not shown. */
  #readLink(pattern, margin) {
    pattern.lastIndex = this.#at;
    const found = pattern.exec(this.#text)?.[0];
    let shown = found?.slice(margin, found.length - margin);
    if (!margin) shown = shown && withoutTail(shown);
    const address = shown ? safeAddress(shown) : null;
    if (address === null || this.#frames.some((frame) => frame.mark === "[")) return this.#literal(1);
    this.#put(link(address, [shown]));
    this.#at += shown.length + 2 * margin;
  }

  #readMarks(character) {
    const length = this.#run(character);
    const before = this.#at > 0 ? previousCharacter(this.#text, this.#at) : "";
    const after = String.fromCodePoint(this.#text.codePointAt(this.#at + length) ?? 0x20);
    const [opens, closes] = flanks(character, before, after);
    if (character === "~" && length !== 2) return this.#literal(length);
    const run = { length, both: opens && closes };
    const left = closes ? this.#closeMarks(character, run) : length;
    if (!opens || left === 0) return this.#literal(left);
    if (left % 2) this.#open(character, 1, character, run);
    for (let pairs = Math.floor(left / 2); pairs > 0; pairs--) this.#open(character, 2, character.repeat(2), run);
  }

  /** Of two marks that opened together, one has been closed. The other may be closed later. */
  #leaveOpen({ mark, run }) {
    const below = this.#frames.at(-1);
    if (below.run !== run || below.size !== 1 || below.children.length > 0) {
      this.#frames.push({ mark, size: 1, literal: mark, run, children: [] });
    } else Object.assign(below, { size: 2, literal: mark.repeat(2) });
  }

  /** Close what is open with a run of the character at hand. Returns how many of them are left. */
  #closeMarks(character, run) {
    let left = run.length;
    while (left > 0) {
      const index = this.#frames.findLastIndex((frame) => frame.mark === character && fit(frame.run, run));
      if (index < 0) break;
      if (character === "~" && left < 2) break;
      this.#dissolve(index);
      const frame = this.#frames.pop();
      const used = Math.min(frame.size, left);
      if (frame.size > used) this.#leaveOpen(frame);
      this.#put(element(character === "~" ? "del" : used === 2 ? "strong" : "em", {}, ...frame.children));
      this.#at += used;
      left -= used;
    }
    return left;
  }
}

/** A link's children without the links that images in it have become. */
function unlinked(children) {
  return children.flatMap((child) => {
    if (child.localName === "a") return [...child.childNodes];
    child.querySelectorAll?.("a").forEach((each) => each.replaceWith(...each.childNodes));
    return [child];
  });
}

/** CommonMark's rule of three, without which `**a*b*c**` would be read wrongly. */
function fit(opening, closing) {
  if (!opening.both && !closing.both) return true;
  return (opening.length + closing.length) % 3 !== 0 || (opening.length % 3 === 0 && closing.length % 3 === 0);
}

/** A bare link without the punctuation after it. A closing bracket is part of it if it was opened in it. */
function withoutTail(address) {
  const count = (bracket) => address.split(bracket).length - 1;
  for (let most = 8; most > 0 && /[.,:;!?'*_~)\]]$/.test(address); most--) {
    if (address.endsWith(")") && count("(") >= count(")")) break;
    address = address.slice(0, -1);
  }
  return address;
}

function previousCharacter(text, at) {
  const code = text.charCodeAt(at - 1);
  const pair = code >= 0xdc00 && code <= 0xdfff && at > 1;
  return text.slice(at - (pair ? 2 : 1), at);
}

/** Whether a run of marks between two characters may open, and whether it may close: CommonMark's rules. */
function flanks(mark, before, after) {
  const [spaceBefore, spaceAfter] = [SPACE.test(before), SPACE.test(after)];
  const [pointBefore, pointAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!pointAfter || spaceBefore || pointBefore);
  const right = !spaceBefore && (!pointBefore || spaceAfter || pointAfter);
  if (mark !== "_") return [left, right];
  return [left && (!right || pointBefore), right && (!left || pointAfter)];
}
