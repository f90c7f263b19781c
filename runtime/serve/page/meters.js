/** Figures beside the picture, each with up to a minute of it as a line. */

import { element, find } from "./dom.js";

const [LEAST, MOST] = [10_000, 60_000]; // milliseconds that a line goes back
const [WIDTH, HEIGHT] = [100, 20]; // of a line, in its own units
const SVG = "http://www.w3.org/2000/svg";

/** What is shown: a name, the number of a snapshot, how it is written, and a most that it can be, if there is one. */
const METERS = [
  { name: "tokens/s", value: (s) => s.tokens_per_second, words: (v) => v.toFixed(v < 10 ? 1 : 0) },
  { name: "hit ratio", value: (s) => s.hit_ratio, words: (v) => v.toFixed(2), most: 1, offloaded: true },
  { name: "link", value: (s) => s.link?.bytes_per_second, words: (v) => `${bytes(v)}/s`, offloaded: true },
  { name: "waited for it", value: (s) => s.link?.waited_share, words: (v) => `${Math.round(100 * v)} %`, most: 1, offloaded: true },
];

export class Meters {
  #list = find("meters");
  #meters = METERS.map(meter);
  #counts = element("dd");
  #copied = element("dd");
  #requests = element("div", {}, element("dt", {}, "requests"), this.#counts);
  #copies = element("div", {}, element("dt", {}, "copied"), this.#copied);

  constructor() {
    this.#list.append(...this.#meters.map(({ row }) => row), this.#requests, this.#copies);
    this.#requests.hidden = this.#copies.hidden = true; // until something is known
  }

  show(snapshot, now = performance.now()) {
    for (const each of this.#meters) {
      const value = each.value(snapshot);
      const hidden = typeof value !== "number" || (each.offloaded === true && snapshot.resident);
      each.row.hidden = hidden;
      if (!hidden) each.add(now, value);
    }
    this.#counts.textContent = `${snapshot.running} running, ${snapshot.queued} waiting`;
    this.#copied.textContent = `${bytes(snapshot.copied_bytes)}, ${bytes(snapshot.wasted_bytes)} wasted`;
    this.#requests.hidden = false;
    this.#copies.hidden = snapshot.resident;
  }
}

function meter(what) {
  const line = document.createElementNS(SVG, "polyline");
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  drawing.append(line);
  const words = element("span");
  const past = [];
  const add = (now, value) => {
    past.push([now, value]);
    while (past[0][0] < now - MOST) past.shift();
    const span = Math.max(now - past[0][0], LEAST);
    const most = what.most ?? (Math.max(...past.map(([, each]) => each)) || 1);
    line.setAttribute("points", past.map(([time, each]) => point((now - time) / span, each / most)).join(" "));
    words.textContent = what.words(value);
  };
  const row = element("div", { hidden: true }, element("dt", {}, what.name), element("dd", {}, words, drawing));
  return { ...what, add, row };
}

function point(age, share) {
  const x = WIDTH * (1 - age);
  const y = 1 + (HEIGHT - 2) * (1 - Math.min(Math.max(share, 0), 1));
  return `${x.toFixed(2)},${y.toFixed(2)}`;
}

/** 1536 is "1.5 KiB". */
export function bytes(count) {
  let unit = 0;
  for (; count >= 1024 && unit < 4; unit++) count /= 1024;
  return `${count.toFixed(unit && count < 100 ? 1 : 0)} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}
