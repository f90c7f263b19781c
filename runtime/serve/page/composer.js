/** The field for the next message, and the keys that work on the whole page. */

import { find } from "./dom.js";

export class Composer {
  #form = find("composer");
  #field = find("prompt");
  #editing = null; // the turn that the next message replaces

  /** `act` has send(text, turn), stop(), retry(), clear(), settings(), experts() and lastQuestion(). */
  constructor(act) {
    this.act = act;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.#field.addEventListener("input", () => this.#fit());
    this.#field.addEventListener("keydown", (event) => this.#fieldKey(event));
    find("stop").addEventListener("click", () => act.stop());
    find("cancel-edit").addEventListener("click", () => this.edit(null));
    document.addEventListener("keydown", (event) => this.#pageKey(event));
    this.#fit();
  }

  /** Put a turn's text into the field, to be sent in its place. With null, leave that off. */
  edit(turn) {
    this.#editing = turn;
    this.#field.value = turn?.content ?? "";
    find("editing").hidden = turn === null;
    this.#fit();
    this.focus();
  }

  focus() {
    this.#field.focus();
  }

  /** Show the button that fits: one sends, and one stops. */
  busy(is) {
    const had = document.activeElement;
    find("stop").hidden = !is;
    find("send").hidden = is;
    if (had === find("stop") || had === find("send")) this.focus();
  }

  #send() {
    const text = this.#field.value;
    if (text.trim() === "" || !this.act.send(text, this.#editing)) return;
    this.edit(null);
  }

  #fieldKey(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey && (event.ctrlKey || !matchMedia("(pointer: coarse)").matches)) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && this.#field.value === "" && this.act.lastQuestion()) {
      event.preventDefault();
      this.edit(this.act.lastQuestion());
    }
  }

  #pageKey(event) {
    if (document.querySelector("dialog[open]")) return;
    const { key, altKey } = event;
    const does = altKey && { KeyN: "clear", KeyR: "retry", KeyS: "settings", KeyE: "experts" }[event.code];
    if (does) this.act[does]();
    else if (key === "Escape" && this.#editing) this.edit(null);
    else if (key === "Escape") this.act.stop();
    else if (key === "/" && !altKey && !document.activeElement?.matches("input, textarea, select")) this.focus();
    else return;
    event.preventDefault();
  }

  /** As high as its text, up to what the style sheet allows. */
  #fit() {
    this.#field.style.height = "auto";
    this.#field.style.height = `${this.#field.scrollHeight + 2}px`;
  }
}
