/** The conversation on the page: one article for each turn, redrawn at most once a frame. */

import { button, copyButton, element, find } from "./dom.js";
import { showMarkdown, showPlain } from "./markdown.js";

const NEAR_END = 48; // pixels from the end within which the log follows what is written

export class Messages {
  #log = find("log");
  #empty = find("empty");
  #views = new Map(); // by turn
  #stale = new Set(); // turns to redraw
  #follows = true;
  #height = 0; // of the log, as far as it is known

  /** `act` has retry(), edit(index), and `settings` says how answers are shown. */
  constructor(conversation, settings, act) {
    this.conversation = conversation;
    this.settings = settings;
    this.act = act;
    this.#log.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.#log;
      if (clientHeight !== this.#height) return; // no reader scrolled: the log has another size
      this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_END;
    });
    new ResizeObserver(() => {
      this.#height = this.#log.clientHeight; // the picture or a keyboard came or went
      this.#follow();
    }).observe(this.#log);
  }

  /** A turn has changed; without one, all may have, and which there are. */
  changed(turn) {
    if (turn === null) {
      this.#arrange();
      this.#follows = true;
    }
    const first = this.#stale.size === 0;
    for (const each of turn ? [turn] : this.conversation.turns) this.#stale.add(each);
    if (first) requestAnimationFrame(() => this.#redraw());
  }

  #arrange() {
    const { turns } = this.conversation;
    for (const [turn, view] of this.#views) {
      if (turns.includes(turn)) continue;
      view.article.remove();
      this.#views.delete(turn);
    }
    for (const turn of turns) {
      if (this.#views.has(turn)) continue;
      this.#views.set(turn, this.#made(turn));
      this.#log.append(this.#views.get(turn).article);
    }
    this.#empty.hidden = turns.length > 0;
  }

  #made(turn) {
    const text = element("div", { class: "text" });
    const note = element("span", { class: "note" });
    const figures = element("span", { class: "figures" });
    const buttons = element("span", { class: "actions" }, copyButton(() => turn.content));
    const isUser = turn.role === "user";
    if (isUser) buttons.append(button("Edit", "Change this message and send it again", () => this.act.edit(turn)));
    else buttons.append(button("Retry", "Have this answer written again (Alt+R)", () => this.act.retry()));
    const label = isUser ? "You" : turn.plain ? "Continuation" : "Answer";
    const foot = element("footer", {}, note, figures, buttons);
    const article = element("article", { class: turn.role, "aria-label": label }, text, foot);
    return { article, text, note, figures, buttons };
  }

  #redraw() {
    const { turns } = this.conversation;
    for (const turn of this.#stale) if (this.#views.has(turn)) this.#draw(turn, this.#views.get(turn));
    this.#stale.clear();
    for (const [i, turn] of turns.entries()) {
      const last = i === turns.length - 1;
      this.#views.get(turn)?.buttons.querySelectorAll("button").forEach((each) => {
        each.disabled = this.conversation.busy && each.textContent !== "Copy" && each.textContent !== "Copied";
        if (each.textContent === "Retry") each.hidden = !last;
      });
    }
    this.#follow();
  }

  #follow() {
    if (this.#follows) this.#log.scrollTop = this.#log.scrollHeight;
  }

  #draw(turn, { article, text, note, figures }) {
    article.dataset.state = turn.state ?? "done";
    article.classList.toggle("forgotten", turn.forgotten);
    article.setAttribute("aria-busy", turn.state === "waiting" || turn.state === "writing");
    if (turn.role === "assistant" && !turn.plain && this.settings.showsMarkdown) showMarkdown(text, turn.content);
    else showPlain(text, turn.content);
    note.textContent = turn.note ?? (turn.state === "done" && turn.content === "" ? "the model wrote nothing" : "");
    figures.textContent = turn.times ? figuresOf(turn) : "";
  }
}

/** What an answer took: "41 tokens, first after 0.06 s, 190 tokens/s". */
function figuresOf({ times, tokens, state }) {
  if (times.first === null) return "";
  const parts = [`${tokens.new} token${tokens.new === 1 ? "" : "s"}`, `first after ${((times.first - times.sent) / 1000).toFixed(2)} s`];
  if (tokens.new > 1 && times.last > times.first) {
    const rate = ((tokens.new - 1) * 1000) / (times.last - times.first);
    parts.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
  }
  if (state === "done" && tokens.prompt !== null) {
    parts.push(`prompt ${tokens.prompt}${tokens.reused ? `, ${tokens.reused} of them reused` : ""}`);
  }
  return parts.join(" · ");
}
