/** Light, dark, or as the system has it: a button goes round. */

import { find } from "./dom.js";

const STORE = "mixtral-runtime theme";
const THEMES = ["auto", "light", "dark"];

export function startTheme() {
  const control = find("theme");
  let theme = "auto";
  try {
    theme = localStorage.getItem(STORE) ?? "auto";
  } catch {
    // nothing is kept
  }
  const set = (name) => {
    theme = THEMES.includes(name) ? name : "auto";
    document.documentElement.dataset.theme = theme;
    control.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
    control.setAttribute("aria-label", `Colors: ${theme}`);
  };
  set(theme);
  control.addEventListener("click", () => {
    set(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
    try {
      localStorage.setItem(STORE, theme);
    } catch {
      // then the choice lasts as long as the page
    }
  });
}
