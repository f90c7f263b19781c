/** Requests to the server that this page came from. Addresses are relative, so a proxy's prefix is kept. */

import { events } from "./sse.js";

/** What the server or the network said, in one line. `status` is 0 if there was no answer. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null, retryAfter = null) {
    super(message);
    this.status = status;
    this.code = code; // the server's word for it, if it has one
    this.retryAfter = retryAfter; // seconds
  }
}

export class Api {
  #key = null; // in memory only
  #asking = null;

  /** `askKey(why)` gives a promise of a key, or of null if the user gives none. */
  constructor(askKey) {
    this.askKey = askKey;
  }

  async models(signal) {
    const response = await this.#asked("v1/models", null, signal);
    return (await response.json()).data.map((model) => model.id);
  }

  /** The objects that a streamed answer consists of, up to [DONE]. An error among them is thrown. */
  async *stream(path, body, signal) {
    const response = await this.#asked(path, body, signal);
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      const object = parse(data);
      if (object.error) throw new ApiError(messageOf(object) ?? "the server failed", 500);
      yield object;
    }
    throw new ApiError("the connection broke off before the answer's end");
  }

  /** Snapshots of the experts, for as long as the connection lasts. Asks for no key: what the user does, does. */
  async *experts(signal) {
    const response = await this.#sent("experts/stream", null, signal);
    for await (const data of events(response)) yield parse(data);
  }

  async #asked(path, body, signal) {
    while (true) {
      const key = this.#key;
      try {
        return await this.#sent(path, body, signal);
      } catch (error) {
        if (error.status !== 401) throw error;
        if (key !== this.#key) continue; // another request has got one meanwhile
        if (!(await this.#newKey(key))) throw new ApiError("this server wants an API key", 401);
      }
    }
  }

  /** Ask for a key, once for all requests that lack one. */
  #newKey(old) {
    this.#asking ??= this.askKey(old === null ? "This server wants an API key." : "The server refused that key.")
      .then((key) => {
        if (key !== null) this.#key = key;
        return key !== null;
      })
      .finally(() => (this.#asking = null));
    return this.#asking;
  }

  async #sent(path, body, signal) {
    const headers = {};
    if (this.#key !== null) headers.Authorization = `Bearer ${this.#key}`;
    if (body !== null) headers["Content-Type"] = "application/json";
    const options = { method: body === null ? "GET" : "POST", headers, signal, credentials: "omit", cache: "no-store" };
    if (body !== null) options.body = JSON.stringify(body);
    let response;
    try {
      response = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("the server cannot be reached");
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => null);
    const after = Number.parseFloat(response.headers.get("Retry-After"));
    const message = messageOf(said) ?? `the server answered ${response.status} ${response.statusText}`.trim();
    throw new ApiError(message, response.status, said?.error?.code ?? null, Number.isFinite(after) ? after : null);
  }
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("the server sent something that is not JSON");
  }
}

function messageOf(body) {
  const message = body?.error?.message;
  return typeof message === "string" ? message : null;
}
