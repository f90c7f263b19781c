/** Server-sent events, read from a response's body. */

/** Takes text in any pieces and gives the data of the events that are complete. */
export class EventParser {
  #rest = "";
  #data = [];
  #afterReturn = false; // the last piece ended in \r, which a \n may follow

  push(piece) {
    const skipped = this.#afterReturn && piece.startsWith("\n") ? 1 : 0;
    if (piece !== "") this.#afterReturn = piece.endsWith("\r");
    piece = piece.slice(skipped);
    const lines = (this.#rest + piece).split(/\r\n|\n|\r/);
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(line[5] === " " ? 6 : 5));
      } // else a comment, or a field that nothing here needs
    }
    return events;
  }
}

/** The data of each event of a response. Leaving the loop early ends the request. */
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
