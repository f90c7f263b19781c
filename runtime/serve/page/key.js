/** The dialog that asks for an API key. */

import { find } from "./dom.js";

/** A promise of the key that the user gives, or of null. The field is emptied at once. */
export function askKey(why) {
  const dialog = find("key");
  const form = dialog.querySelector("form");
  const field = find("key-value");
  find("key-why").textContent = why;
  field.value = "";
  return new Promise((resolve) => {
    let key = null;
    const listeners = new AbortController();
    const { signal } = listeners;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      key = field.value.trim();
      dialog.close();
    }, { signal });
    find("key-cancel").addEventListener("click", () => dialog.close(), { signal });
    dialog.addEventListener("close", () => {
      listeners.abort();
      field.value = "";
      resolve(key);
    }, { signal });
    dialog.showModal();
  });
}
