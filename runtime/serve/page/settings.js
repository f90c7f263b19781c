/** What the user has set, and the dialog for it. Empty fields are left to the server. */

import { find } from "./dom.js";

const STORE = "mixtral-runtime settings";
const DEFAULTS = { mode: "chat", system: "", temperature: "", top_p: "", max_tokens: "", seed: "", show: "markdown" };
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export class Settings {
  #values = { ...DEFAULTS, ...stored() };
  #dialog = find("settings");
  #form = this.#dialog.querySelector("form");

  /** `changed()` is called after each change. */
  constructor(changed) {
    this.#fill();
    this.#form.addEventListener("input", () => {
      for (const name of Object.keys(DEFAULTS)) {
        const field = this.#form.elements[name];
        if (field.validity.valid) this.#values[name] = field.value;
      }
      this.#keep();
      changed();
    });
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault(); // comes only if every field is valid
      this.#dialog.close();
    });
    find("default-settings").addEventListener("click", () => {
      this.#values = { ...DEFAULTS };
      this.#fill();
      this.#keep();
      changed();
    });
    this.#dialog.addEventListener("close", () => this.#fill()); // what was invalid goes back to what counts
  }

  open() {
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  get isChat() {
    return this.#values.mode === "chat";
  }

  get showsMarkdown() {
    return this.#values.show === "markdown" && this.isChat;
  }

  get system() {
    return this.#values.system;
  }

  /** Fields of a request. Only what was set is in it. */
  sampling() {
    const set = NUMBERS.filter((name) => this.#values[name] !== "").map((name) => [name, Number(this.#values[name])]);
    const { max_tokens, ...fields } = Object.fromEntries(set);
    if (max_tokens !== undefined) fields[this.isChat ? "max_completion_tokens" : "max_tokens"] = max_tokens;
    return fields;
  }

  #fill() {
    for (const [name, value] of Object.entries(this.#values)) this.#form.elements[name].value = value;
  }

  #keep() {
    try {
      localStorage.setItem(STORE, JSON.stringify(this.#values));
    } catch {
      // A browser may keep nothing for pages: then settings last as long as the page.
    }
  }
}

/** Settings of an earlier visit, as far as they are such. */
function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    return Object.fromEntries(Object.keys(DEFAULTS).filter((n) => typeof found[n] === "string").map((n) => [n, found[n]]));
  } catch {
    return {};
  }
}
