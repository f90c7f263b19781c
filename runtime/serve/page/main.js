/** Puts the page together. */

import { Api } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { find } from "./dom.js";
import { askKey } from "./key.js";
import { Messages } from "./messages.js";
import { Settings } from "./settings.js";
import { startTheme } from "./theme.js";
import { Watching } from "./watching.js";

const NARROW = "(max-width: 52rem)";

const api = new Api(askKey);
const settings = new Settings(() => messages.changed(null));
const conversation = new Conversation(api, settings, changed);
const messages = new Messages(conversation, settings, { retry, edit: (turn) => composer.edit(turn) });
const composer = new Composer({
  send,
  retry,
  stop: () => conversation.stop(),
  clear,
  settings: () => settings.open(),
  experts: () => showExperts(find("experts").hidden),
  lastQuestion: () => conversation.turns.findLast((turn) => turn.role === "user"),
});

/** Begin to send; false if an answer is still being written. */
function send(text, replaced) {
  if (conversation.busy) return false;
  const at = conversation.turns.indexOf(replaced);
  conversation.send(text, at < 0 ? undefined : at);
  return true;
}

function retry() {
  conversation.retry();
}

function clear() {
  conversation.clear();
  composer.edit(null);
}

function changed(turn) {
  messages.changed(turn);
  composer.busy(conversation.busy);
  const last = conversation.turns.at(-1);
  const words = conversation.busy ? "Answering." : last?.role === "assistant" ? `Answer ${last.state}. ${last.note ?? ""}` : "";
  if (find("status").textContent !== words) find("status").textContent = words;
}

function showExperts(are) {
  find("experts").hidden = !are;
  find("toggle-experts").setAttribute("aria-expanded", are);
}

async function start() {
  startTheme();
  find("new").addEventListener("click", clear);
  find("open-settings").addEventListener("click", () => settings.open());
  find("toggle-experts").addEventListener("click", () => showExperts(find("experts").hidden));
  showExperts(!matchMedia(NARROW).matches || matchMedia("(min-height: 40rem)").matches);
  composer.focus();
  try {
    const [model] = await api.models();
    conversation.model = model ?? null;
    find("model").textContent = model ?? "";
  } catch (error) {
    find("model").textContent = error.message;
  }
  new Watching(api).start();
}

start();
