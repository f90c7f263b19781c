/** Elements of a document, made without markup: whatever comes from a model is text. */

export const find = (id) => document.getElementById(id);

/** An element with attributes and children. Children are nodes or text; null and false are left out. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== false));
  return made;
}

export function button(label, title, act) {
  const made = element("button", { type: "button", title }, label);
  made.addEventListener("click", () => act(made));
  return made;
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(text) {
  return button("Copy", "Copy the text", async (made) => {
    made.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  });
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text); // there is no clipboard for a page by plain HTTP from another machine
  }
}

function copyBySelection(text) {
  const field = element("textarea", { class: "unseen", "aria-hidden": "true" });
  const before = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  before?.focus();
  return done;
}
