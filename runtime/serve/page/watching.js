/** Keeps the picture and the figures up to date: one stream of snapshots while the page is seen. */

import { find } from "./dom.js";
import { Meters } from "./meters.js";
import { Picture } from "./experts.js";

const PATIENCE = [1, 2, 5, 10]; // seconds before another try

export class Watching {
  #picture = new Picture();
  #meters = new Meters();
  #note = find("experts-note");
  #abort = null;

  constructor(api) {
    this.api = api;
    document.addEventListener("visibilitychange", () => this.#turn());
  }

  /** Begin, or leave off, as the page is seen or not. */
  start() {
    this.#turn();
  }

  #turn() {
    if (document.hidden) {
      this.#abort?.abort();
      this.#abort = null;
    } else if (this.#abort === null) {
      this.#abort = new AbortController();
      this.#watch(this.#abort.signal);
    }
  }

  async #watch(signal) {
    let failures = 0;
    while (!signal.aborted) {
      try {
        for await (const snapshot of this.api.experts(signal)) {
          failures = 0;
          this.#show(snapshot);
        }
        if (!signal.aborted) this.#say("The server has ended the picture's connection.");
      } catch (error) {
        if (!signal.aborted) this.#say(`No picture: ${error.message}.`);
      }
      const seconds = PATIENCE[Math.min(failures++, PATIENCE.length - 1)];
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
    }
  }

  #show(snapshot) {
    if (!isSnapshot(snapshot)) return this.#say("No picture: the server sent one that this page does not know.");
    this.#picture.show(snapshot);
    this.#meters.show(snapshot);
    this.#say(snapshot.resident ? "All experts are on the device." : "");
  }

  #say(words) {
    if (this.#note.textContent !== words) this.#note.textContent = words;
  }
}

function isSnapshot(given) {
  return (
    Number.isInteger(given?.layers) && given.layers > 0 && Number.isInteger(given.experts) && given.experts > 0 &&
    Array.isArray(given.places) && given.places.length === given.layers &&
    given.places.every((row) => typeof row === "string" && row.length === given.experts)
  );
}
