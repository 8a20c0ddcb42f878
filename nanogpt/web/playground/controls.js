// The sampling settings: one row for each, whose range is a sane part of what this server admits.

import { make } from "./dom.js";
import { inEachLanguage, t } from "./i18n.js";
import { DEFAULTS } from "./request.js";

const MAX_STOPS = 8; // of OpenAI's routes, so that every program of the code tab may send them
const MAX_SEED = Number.MAX_SAFE_INTEGER;

// `slide`: what the slider covers; the field beside it takes whatever the server admits. `limits` are narrowed by its
// own description. The penalties' are those that chats admit, too.
const NUMBERS = [
  { name: "max_length", step: 1, slide: [1, 1000], limits: [1, 500] },
  { name: "temperature", step: 0.05, slide: [0, 2], limits: [0, 2] },
  { name: "top_k", step: 1, slide: [0, 200], limits: [0, 200] },
  { name: "top_p", step: 0.01, slide: [0, 1], limits: [0, 1] },
  { name: "min_p", step: 0.01, slide: [0, 0.5], limits: [0, 1], more: true },
  { name: "repetition_penalty", step: 0.01, slide: [0.8, 2], limits: [0.01, 100], more: true },
  { name: "presence_penalty", step: 0.1, slide: [-2, 2], limits: [-2, 2], more: true },
  { name: "frequency_penalty", step: 0.1, slide: [-2, 2], limits: [-2, 2], more: true },
  { name: "logprobs", step: 1, slide: [0, 20], limits: [0, 20], more: true },
];

export class Controls {
  #settings = { ...DEFAULTS };
  #onChange;
  #rows = new Map();

  constructor(root, onChange) {
    this.#onChange = onChange;
    const more = make("details", { class: "more" }, make("summary", { "data-word": "more" }));
    this.system = this.#area("system", 2, (text) => text);
    this.system.hidden = true;
    root.append(this.system);
    for (const field of NUMBERS) (field.more ? more : root).append(this.#number(field));
    root.append(this.#seed(), this.#area("stop", 2, readStops), more);
    more.append(this.#area("logit_bias", 2, readBiases));
    inEachLanguage(() => {
      for (const row of this.#rows.values()) row.slider?.setAttribute("aria-label", t(`field.${row.name}`));
    });
  }

  /** Show these settings, and change them from now on. */
  show(settings) {
    this.#settings = settings;
    for (const row of this.#rows.values()) row.show(settings[row.name]);
  }

  /** The limits of this server: from its /openapi.json, and from its model. */
  limit(properties, info) {
    for (const row of this.#rows.values()) {
      const told = properties?.[row.name];
      const bounds = told?.anyOf?.find((one) => one.maximum !== undefined) ?? told;
      if (!row.limits || !bounds) continue;
      row.limits = [Math.max(row.least, bounds.minimum ?? row.least), bounds.maximum ?? row.limits[1]];
      if (row.name.endsWith("_penalty")) row.limits[1] = Math.min(row.limits[1], row.most);
      if (row.name === "top_k" && info?.vocabulary) row.limits[1] = Math.min(row.limits[1], info.vocabulary);
      row.bound();
      row.put(this.#settings[row.name]);
    }
  }

  /** Mark the field that the server found fault with; "" none. */
  mark(name) {
    const of = { max_completion_tokens: "max_length", max_tokens: "max_length", top_logprobs: "logprobs" }[name] ?? name;
    for (const row of this.#rows.values()) row.mark(row.name === of);
  }

  /** Why the settings cannot be sent; "" if they can. */
  get problem() {
    return [...this.#rows.values()].map((row) => row.problem).find(Boolean) ?? "";
  }

  #row(name, id, input, extra, parts) {
    const help = make("p", { class: "hint", id: `${id}-help`, "data-word": `help.${name}` });
    const row = {
      name,
      problem: "",
      mark: (wrong) => (wrong ? input.setAttribute("aria-invalid", "true") : input.removeAttribute("aria-invalid")),
      ...extra,
    };
    this.#rows.set(name, row);
    const label = make("label", { for: id, "data-word": `field.${name}` });
    return [row, make("div", { class: `row row-${name}` }, label, ...parts, help), help];
  }

  #set(name, value) {
    this.#settings[name] = value;
    this.#onChange();
  }

  #number({ name, step, slide, limits }) {
    const id = `set-${name}`;
    const input = make("input", { id, type: "number", step, inputmode: "decimal", "aria-describedby": `${id}-help` });
    const slider = make("input", { type: "range", step });
    const [row, element] = this.#row(name, id, input, { slider, limits: [...limits], least: limits[0], most: limits[1] }, [input, slider]);
    row.bound = () => {
      [input.min, input.max] = row.limits;
      slider.min = Math.max(slide[0], row.limits[0]);
      slider.max = Math.min(slide[1], row.limits[1]);
    };
    row.show = (value) => {
      input.value = value;
      slider.value = value;
      row.mark(false);
    };
    row.put = (value) => {
      const [low, high] = row.limits;
      let kept = Math.min(high, Math.max(low, Number.isFinite(value) ? value : DEFAULTS[name]));
      if (step === 1) kept = Math.round(kept);
      row.show(kept);
      if (kept !== this.#settings[name]) this.#set(name, kept);
    };
    slider.addEventListener("input", () => row.put(slider.valueAsNumber));
    input.addEventListener("change", () => row.put(input.valueAsNumber));
    row.bound();
    return element;
  }

  #seed() {
    const id = "set-seed";
    const input = make("input", {
      id, type: "number", step: 1, min: 0, max: MAX_SEED, inputmode: "numeric", "aria-describedby": `${id}-help`,
    });
    const [row, element] = this.#row("seed", id, input, {}, [input]);
    row.show = (value) => {
      input.value = value ?? "";
    };
    input.addEventListener("change", () => {
      const value = input.valueAsNumber;
      const kept = Number.isFinite(value) ? Math.min(MAX_SEED, Math.max(0, Math.round(value))) : null;
      row.show(kept);
      this.#set("seed", kept);
    });
    return element;
  }

  /** A text that `read` makes a value of; it throws what is wrong with it. */
  #area(name, rows, read) {
    const id = `set-${name}`;
    const area = make("textarea", { id, rows, spellcheck: "false", "aria-describedby": `${id}-help ${id}-wrong` });
    const wrong = make("p", { class: "wrong", id: `${id}-wrong` });
    const [row, element] = this.#row(name, id, area, {}, [area]);
    element.append(wrong);
    row.show = (value) => {
      area.value = written(value);
      row.problem = wrong.textContent = "";
      row.mark(false);
    };
    area.addEventListener("input", () => {
      row.problem = "";
      try {
        this.#set(name, read(area.value));
      } catch (error) {
        row.problem = error.message;
      }
      wrong.textContent = row.problem;
      row.mark(row.problem !== "");
    });
    return element;
  }
}

function written(value) {
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map((stop) => stop.replaceAll("\\", "\\\\").replaceAll("\n", "\\n").replaceAll("\t", "\\t")).join("\n");
  return Object.entries(value).map(([id, bias]) => `${id}: ${bias}`).join("\n");
}

function readStops(text) {
  const escapes = { n: "\n", t: "\t", "\\": "\\" };
  const stops = text.split("\n").filter(Boolean).map((line) => line.replace(/\\([nt\\])/g, (_, letter) => escapes[letter]));
  if (stops.length > MAX_STOPS) throw new Error(t("error.stops", { n: MAX_STOPS }));
  return stops;
}

function readBiases(text) {
  const biases = {};
  for (const line of text.split("\n").filter((each) => each.trim())) {
    const found = /^\s*(\d{1,10})\s*[:=]\s*(-?\d+(?:\.\d+)?)\s*$/.exec(line);
    if (!found || Math.abs(Number(found[2])) > 100) throw new Error(t("error.bias", { line }));
    biases[found[1]] = Number(found[2]);
  }
  return biases;
}
