// The page's language: the browser's, until somebody chooses. Elements with data-word or data-label are kept in it.

import { recall, remember } from "./remember.js";
import { WORDS } from "./words.js";

const listeners = [];
let language = recall("language") ?? (navigator.languages ?? [navigator.language]).find((l) => /^(en|zh)/i.test(l)) ?? "en";
language = language.toLowerCase().startsWith("zh") ? "zh" : "en";

export const currentLanguage = () => language;

export function t(key, values = {}) {
  const text = WORDS[language][key] ?? WORDS.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export const number = (value, digits = 0) =>
  new Intl.NumberFormat(language, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);

/** 42 %, 0.31 %: as many digits as tell something. */
export const percent = (p) =>
  p >= 0.9995 ? "100 %" : `${new Intl.NumberFormat(language, { maximumSignificantDigits: 2 }).format(p * 100)} %`;

/** Called at once, and whenever the language changes. */
export function inEachLanguage(listener) {
  listeners.push(listener);
  listener();
}

export function setLanguage(chosen) {
  language = chosen;
  remember("language", chosen);
  apply();
}

export function apply(root = document) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-word]")) element.textContent = t(element.dataset.word);
  for (const element of root.querySelectorAll("[data-label]")) element.setAttribute("aria-label", t(element.dataset.label));
  if (root === document) for (const listener of listeners) listener();
}
