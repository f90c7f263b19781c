/** A conversation: its turns, and the request that is writing the last one. Knows nothing of elements. */

const FULL = "context_length_exceeded"; // the server's word for a conversation that is too long
const FORGOTTEN = "the context is full: no longer sent";
const ENDS = { stop: null, length: "stopped at the limit of tokens", content_filter: "stopped by the server" };

/** A turn has role and content, may be `forgotten`, so that the model is no longer told of it, and an answer has
 *
 * state   "waiting", "writing", "done", "stopped" (by the user) or "failed"
 * plain   whether it is shown as it is, because it continues a text
 * note    what there is to say about how it ended, or null
 * times   {sent, first, last} in milliseconds; first and last are null until a token came
 * tokens  {prompt, reused, new}; before the server has told them, new counts the pieces that came
 */
export class Conversation {
  turns = [];
  model = null;
  #abort = null;

  /** `changed(turn)` is called when a turn has grown or ended, and with null when there are others. */
  constructor(api, settings, changed) {
    this.api = api;
    this.settings = settings;
    this.changed = changed;
  }

  get busy() {
    return this.#abort !== null;
  }

  /** Send a text. With `at`, it replaces that turn and all after it. */
  async send(text, at = this.turns.length) {
    if (this.busy) return;
    if (at < this.turns.length) for (const turn of this.turns) if (turn.forgotten) remember(turn);
    this.turns.splice(at);
    this.turns.push({ role: "user", content: text, note: null, forgotten: false });
    await this.#answer();
  }

  /** Have the last answer written again. */
  async retry() {
    if (this.busy || this.turns.at(-1)?.role !== "assistant") return;
    this.turns.pop();
    await this.#answer();
  }

  stop() {
    this.#abort?.abort();
  }

  clear() {
    this.stop();
    this.#abort = null; // what was being written may end later, unseen
    this.turns = [];
    this.changed(null);
  }

  async #answer() {
    const turn = { role: "assistant", content: "", state: "waiting", note: null, forgotten: false };
    turn.plain = !this.settings.isChat;
    turn.times = { sent: performance.now(), first: null, last: null };
    turn.tokens = { prompt: null, reused: null, new: 0 };
    const abort = (this.#abort = new AbortController());
    this.turns.push(turn);
    this.changed(null);
    try {
      while (!(await this.#write(turn, abort.signal)));
      turn.state = "done";
    } catch (error) {
      turn.state = abort.signal.aborted ? "stopped" : "failed";
      turn.note = abort.signal.aborted ? "stopped" : describe(error);
    }
    if (this.#abort === abort) this.#abort = null;
    if (this.turns.includes(turn)) this.changed(turn);
  }

  /** Have an answer written. False if the conversation was too long: then half of it is forgotten. */
  async #write(turn, signal) {
    const [path, body] = this.#request(this.turns.slice(0, this.turns.indexOf(turn)));
    try {
      for await (const event of this.api.stream(path, body, signal)) this.#take(turn, event);
      return true;
    } catch (error) {
      if (error.code !== FULL || !this.settings.isChat || !this.#forget(turn)) throw error;
      return false;
    }
  }

  /** Leave out the older half of the questions and their answers. False if there is only one question. */
  #forget(turn) {
    const known = this.turns.filter((each) => !each.forgotten && each !== turn);
    const questions = known.filter((each) => each.role === "user");
    if (questions.length < 2) return false;
    const first = questions[Math.ceil((questions.length - 1) / 2)]; // that is still told
    for (const each of known.slice(0, known.indexOf(first))) {
      each.forgotten = true;
      each.note = FORGOTTEN;
    }
    this.changed(null);
    return true;
  }

  /** Path and body of the request for an answer to some turns. */
  #request(turns) {
    const common = { stream: true, stream_options: { include_usage: true }, ...this.settings.sampling() };
    if (this.model !== null) common.model = this.model;
    if (!this.settings.isChat) return ["v1/completions", { prompt: turns.at(-1).content, ...common }];
    return ["v1/chat/completions", { messages: this.#messages(turns), ...common }];
  }

  /** What the model is told: a question that got no answer is left out, since roles have to alternate. */
  #messages(turns) {
    const kept = turns.filter((turn, i) => {
      const answer = turn.role === "assistant" ? turn : turns[i + 1];
      return !turn.forgotten && (answer === undefined || answer.content !== "");
    });
    const system = this.settings.system.trim() ? [{ role: "system", content: this.settings.system }] : [];
    return [...system, ...kept.map(({ role, content }) => ({ role, content }))];
  }

  #take(turn, event) {
    const choice = event.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    if (typeof piece === "string" && piece !== "") {
      turn.content += piece;
      turn.state = "writing";
      turn.times.last = performance.now();
      turn.times.first ??= turn.times.last;
      turn.tokens.new += 1;
    }
    if (choice?.finish_reason) turn.note = ENDS[choice.finish_reason] ?? null;
    if (event.usage) {
      turn.tokens.new = event.usage.completion_tokens;
      turn.tokens.prompt = event.usage.prompt_tokens;
      turn.tokens.reused = event.usage.prompt_tokens_details?.cached_tokens ?? null;
    }
    this.changed(turn);
  }
}

function remember(turn) {
  turn.forgotten = false;
  turn.note = null;
}

function describe(error) {
  const after = error.retryAfter > 0 ? ` Try again in ${Math.ceil(error.retryAfter)} s.` : "";
  return `${error.message}${after && !/[.!?]$/.test(error.message) ? "." : ""}${after}`;
}
