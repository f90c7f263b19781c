/** The picture of the experts: a cell for each, layers by experts, and what is known of the cell at hand. */

import { element, find } from "./dom.js";

const PLACES = {
  s: ["slot", "in a slot", "on the device"],
  l: ["coming", "on its way", "to a slot"],
  g: ["guess", "guessed", "copied ahead into a spare slot"],
  b: ["berth", "in host memory", "in a berth"],
  f: ["file", "in its file", "has to be read from there"],
};
const USES = { hit: ["hit", "hit in the last step", "chosen, and there"], miss: ["miss", "missed in the last step", "chosen, and not there"] };

export class Picture {
  #root = find("picture");
  #words = find("cell");
  #cells = []; // by layer, then expert
  #layers = 0;
  #experts = 0;
  #at = null; // [layer, expert] that is described
  #snapshot = null;

  constructor() {
    find("legend").append(...[...Object.values(PLACES), ...Object.values(USES)].map(legend));
    this.#root.addEventListener("pointermove", (event) => this.#point(event.target));
    this.#root.addEventListener("pointerdown", (event) => this.#point(event.target));
    this.#root.addEventListener("pointerleave", () => this.#describe(null));
    this.#root.addEventListener("focus", () => this.#at ?? this.#describe([0, 0]));
    this.#root.addEventListener("blur", () => this.#describe(null));
    this.#root.addEventListener("keydown", (event) => this.#move(event));
  }

  /** Show a snapshot of the server's. */
  show(snapshot) {
    const { layers, experts, places } = snapshot;
    if (layers !== this.#layers || experts !== this.#experts) this.#build(layers, experts);
    this.#snapshot = snapshot;
    for (let layer = 0; layer < layers; layer++) {
      const hit = new Set(snapshot.last?.[layer]?.hit);
      const miss = new Set(snapshot.last?.[layer]?.miss);
      for (let expert = 0; expert < experts; expert++) {
        const use = miss.has(expert) ? " miss" : hit.has(expert) ? " hit" : "";
        const name = `${PLACES[places[layer]?.[expert]]?.[0] ?? "unknown"}${use}`;
        const cell = this.#cells[layer][expert];
        if (cell.className !== name) cell.className = name;
      }
    }
    this.#root.setAttribute("aria-label", summary(snapshot));
    this.#words.setAttribute("aria-live", "off");
    if (this.#at) this.#describe(this.#at);
  }

  #build(layers, experts) {
    [this.#layers, this.#experts] = [layers, experts];
    this.#root.style.setProperty("--layers", layers);
    this.#root.style.setProperty("--experts", experts);
    this.#cells = Array.from({ length: layers }, () => Array.from({ length: experts }, () => element("i")));
    const number = (kind, i, row, column) => {
      const minor = kind === "layer" && this.#layers > 16 && i % 4 > 0; // there is no room for so many numbers
      const made = element("b", { class: minor ? "minor" : null }, String(i));
      made.style.setProperty("--row", row);
      made.style.setProperty("--column", column);
      return made;
    };
    const marks = [
      ...Array.from({ length: layers }, (_, i) => number("layer", i, i + 2, 1)),
      ...Array.from({ length: experts }, (_, i) => number("expert", i, 1, i + 2)),
    ];
    for (const [layer, row] of this.#cells.entries()) {
      for (const [expert, cell] of row.entries()) {
        cell.style.setProperty("--row", layer + 2);
        cell.style.setProperty("--column", expert + 2);
      }
    }
    this.#root.replaceChildren(...marks, ...this.#cells.flat());
    this.#describe(null);
  }

  #point(target) {
    const index = this.#cells.flat().indexOf(target);
    if (index >= 0) this.#describe([Math.floor(index / this.#experts), index % this.#experts]);
  }

  #move(event) {
    if (this.#at === null) return;
    const turned = getComputedStyle(this.#root).getPropertyValue("--turned").trim() === "1"; // layers from left to right
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const [down, right] = turned ? [step[1], step[0]] : step;
    const within = (value, size) => Math.min(Math.max(value, 0), size - 1);
    this.#words.setAttribute("aria-live", "polite"); // said once, and not with every snapshot
    this.#describe([within(this.#at[0] + down, this.#layers), within(this.#at[1] + right, this.#experts)]);
  }

  #describe(at) {
    const before = this.#at && this.#cells[this.#at[0]]?.[this.#at[1]];
    before?.removeAttribute("aria-current");
    this.#at = at && this.#layers ? at : null;
    let words = "";
    if (this.#at && this.#snapshot) {
      const [layer, expert] = this.#at;
      this.#cells[layer][expert].setAttribute("aria-current", "true");
      const use = ["hit", "miss"].find((kind) => this.#snapshot.last?.[layer]?.[kind]?.includes(expert));
      const place = PLACES[this.#snapshot.places[layer]?.[expert]]?.[1] ?? "unknown";
      words = `Layer ${layer}, expert ${expert}: ${place}${use ? `; ${USES[use][1]}` : ""}`;
    }
    if (this.#words.textContent !== words) this.#words.textContent = words;
  }
}

function legend([name, label, more]) {
  return element("li", { title: more }, element("i", { class: name }), label);
}

/** The picture in words, for those who do not see it. */
function summary({ layers, experts, places, resident }) {
  const all = places.join("");
  const counts = Object.entries(PLACES)
    .map(([letter, [, label]]) => [all.split(letter).length - 1, label])
    .filter(([count]) => count > 0)
    .map(([count, label]) => `${count} ${label}`);
  const where = resident ? "all on the device" : counts.join(", ");
  return `${layers} layers of ${experts} experts: ${where}`;
}
