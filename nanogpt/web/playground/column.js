// One answer: its text as tokens, what the answers before it were (in a chat), and how fast it comes.

import { ask } from "./api.js";
import { byId, make } from "./dom.js";
import { inEachLanguage, number, t } from "./i18n.js";
import { hide, inspect, inspected } from "./inspector.js";
import { chatRequest, textRequest } from "./request.js";
import { pieces } from "./stream.js";
import { Aligner, surprise } from "./tokens.js";

export class Column {
  /** `settings`: this column's own, which the controls change. */
  constructor(name, settings, { onKeep, onModel }) {
    this.name = name;
    this.settings = settings;
    this.model = null;
    this.messages = [];
    this.element = byId("answer-template").content.firstElementChild.cloneNode(true);
    this.element.id = `answer-${name}`;
    this.text = this.element.querySelector(".text");
    this.stats = this.element.querySelector(".stats");
    this.models = this.element.querySelector(".of");
    this.models.addEventListener("change", () => {
      this.choose(this.models.value || null);
      onModel(this);
    });
    this.onKeep = onKeep;
    this.tokensOf = new WeakMap();
    this.clear();
    this.#listen();
    inEachLanguage(() => this.label());
  }

  label(alone = this.alone ?? true) {
    this.alone = alone;
    const heading = t(alone ? "answer" : "answer.of", { name: this.name });
    this.element.querySelector("h2").textContent = heading;
    const model = this.models.selectedOptions[0]?.text;
    this.element.setAttribute("aria-label", model ? t("answer.by", { answer: heading, model }) : heading);
    this.models.setAttribute("aria-label", t("answer.model", { answer: heading }));
    this.text.setAttribute("aria-label", `${heading}. ${t("answer.text")}`);
    this.text.dataset.empty = t("answer.empty");
    for (const who of this.text.querySelectorAll(".who")) who.textContent = t(who.dataset.word);
    this.#tell();
  }

  /** Let one of these models be chosen, whose first is the server's default; one alone is no choice. */
  offer(names) {
    const options = names.length > 1 ? names.map((name, i) => make("option", { value: i ? name : "", text: name })) : [];
    this.models.replaceChildren(...options);
    this.models.hidden = !options.length;
    this.choose(names.indexOf(this.model) > 0 ? this.model : null);
  }

  /** Ask this model from now on; null: the default. What another one wrote does not stay under its name. */
  choose(model) {
    if (model !== this.model) this.clear();
    this.model = model;
    this.models.value = model ?? "";
    this.label();
  }

  /** What is asked for: the settings and the model. */
  get wanted() {
    return { ...this.settings, model: this.model };
  }

  /** Forget everything that was written. */
  clear() {
    this.messages = [];
    this.run = null;
    this.text.replaceChildren();
    this.stats.replaceChildren();
  }

  /** What differs from the other column stands out. */
  summarise(other) {
    const shown = ["temperature", "top_k", "top_p", "max_length", "seed"];
    const parts = shown.filter((name) => this.settings[name] !== null).map((name) => {
      const differs = other && JSON.stringify(other[name]) !== JSON.stringify(this.settings[name]);
      return make(differs ? "strong" : "span", { text: `${t(`field.${name}`)} ${this.settings[name]}` });
    });
    this.element.querySelector(".summary").replaceChildren(...(other ? parts : []));
  }

  /** Continue `prompt`. Throws: Failure. Being stopped is no failure. */
  async continue(prompt, options) {
    this.prompt = prompt;
    const into = make("span", { class: "new" });
    this.text.replaceChildren(make("span", { class: "prompt", text: prompt }), into);
    await this.#generate(into, (settings) => textRequest(prompt, settings, options.probabilities), options);
  }

  /** Answer `message`, or the last one once more. Throws: Failure. */
  async reply(message, options) {
    if (message === null) {
      if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
      this.text.querySelector(".turn.model:last-child")?.remove();
    } else {
      this.messages.push({ role: "user", content: message });
      this.text.append(turn("you", make("span", { text: message })));
    }
    const into = make("span", { class: "new" });
    this.text.append(turn("model", into));
    this.text.scrollTop = this.text.scrollHeight;
    await this.#generate(into, (settings) => chatRequest(this.messages, settings, options.probabilities), options);
    if (this.run.written) this.messages.push({ role: "assistant", content: this.run.written });
  }

  /** How the answer ended, to be read out. */
  get said() {
    const answer = this.element.getAttribute("aria-label");
    return t("said.end", { answer, state: t(`end.${this.run.state}`), n: number(this.run.tokens) });
  }

  /** Take back a message that the server did not answer at all. */
  takeBack() {
    if (this.run?.written || this.messages.at(-1)?.role !== "user") return;
    this.messages.pop();
    for (const last of [...this.text.children].slice(-2)) last.remove();
  }

  async #generate(into, request, { signal, seed }) {
    // A seed that is certain, so that what was shown can be asked for again.
    const settings = { ...this.wanted, seed: this.settings.seed ?? seed };
    const run = { started: performance.now(), tokens: 0, first: 0, last: 0, state: "waiting", written: "", seed: settings.seed };
    this.run = run;
    hide();
    const aligner = new Aligner();
    const tail = document.createTextNode("");
    into.append(tail);
    const fresh = [];
    const paint = () => {
      tail.before(...fresh.splice(0));
      tail.data = aligner.rest;
      this.#follow();
      this.#tell();
    };
    let frame = 0; // tokens come faster than frames are painted
    this.text.setAttribute("aria-busy", "true");
    this.#tell();
    try {
      const response = await ask(...(({ path, body }) => [path, { body, signal }])(request(settings)));
      run.cached = response.headers.get("X-Cache") === "hit";
      run.left = response.headers.get("RateLimit-Remaining");
      for await (const piece of pieces(response)) {
        this.#count(run, piece);
        fresh.push(...aligner.push(piece.text, piece.tokens).map((each) => this.#span(each)));
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          paint();
        });
      }
    } catch (error) {
      run.state = error.name === "AbortError" ? "stopped" : "failed";
      if (run.state === "failed") throw error;
    } finally {
      cancelAnimationFrame(frame);
      fresh.push(...aligner.end().map((each) => this.#span(each)));
      this.text.removeAttribute("aria-busy");
      paint();
      tail.remove();
    }
  }

  #count(run, piece) {
    const now = performance.now();
    if (piece.text || piece.tokens.length) {
      run.first ||= now;
      run.last = now;
      run.state = "writing";
      run.tokens += piece.tokens.length || 1;
      run.written += piece.text;
    }
    if (piece.end) {
      run.state = piece.end.reason;
      run.tokens = piece.end.tokens ?? run.tokens;
    }
  }

  #span({ text, tokens }) {
    if (!tokens.length) return document.createTextNode(text);
    const span = make("span", { class: `token p${surprise(tokens)}`, text });
    this.tokensOf.set(span, tokens);
    return span;
  }

  /** A text that fills its box is read at its end. */
  #follow() {
    const hidden = this.text.scrollHeight - this.text.clientHeight - this.text.scrollTop;
    if (hidden < 80) this.text.scrollTop = this.text.scrollHeight;
  }

  #tell() {
    const { run } = this;
    if (!run) return;
    const seconds = (run.last - run.first) / 1000;
    const items = [
      ["state", t(`end.${run.state}`)],
      run.tokens ? ["tokens", number(run.tokens)] : null,
      run.cached ? ["cached", t("end.cached")] : run.tokens > 1 && seconds > 0 ? ["speed", number((run.tokens - 1) / seconds, 0)] : null,
      run.first ? ["ttft", t("stat.ms", { n: number(run.first - run.started) })] : null,
      ["seed", String(run.seed)],
      run.left ? ["left", number(Number(run.left))] : null,
    ];
    this.stats.dataset.state = run.state;
    this.stats.replaceChildren(...items.filter(Boolean).map(([name, value]) => {
      const keep = name === "seed" && this.settings.seed !== run.seed
        ? make("button", { type: "button", class: "quiet", text: t("stat.keep"), "aria-label": t("stat.keep.long", { seed: run.seed }),
            click: () => { this.onKeep(this, run.seed); this.#tell(); } })
        : null;
      return make("div", { class: `stat-${name}` }, make("dt", { text: t(`stat.${name === "cached" ? "state" : name}`) }), make("dd", { text: value }, keep));
    }));
  }

  #listen() {
    const at = (event) => event.target.closest?.(".token");
    this.text.addEventListener("pointerover", (event) => {
      const span = at(event);
      if (span && !document.body.classList.contains("plain")) inspect(span, this.tokensOf.get(span));
    });
    this.text.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    this.text.addEventListener("blur", hide);
    this.text.addEventListener("scroll", hide);
    this.text.addEventListener("keydown", (event) => this.#step(event));
  }

  /** Arrow keys, Home and End go through the tokens. */
  #step(event) {
    const spans = [...this.text.querySelectorAll(".token")];
    if (!spans.length || document.body.classList.contains("plain")) return;
    const now = spans.indexOf(inspected());
    const next = { ArrowRight: now + 1, ArrowLeft: now < 0 ? spans.length - 1 : now - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const span = spans[Math.max(0, Math.min(spans.length - 1, next))];
    span.scrollIntoView({ block: "nearest" });
    // Scrolling tells of itself at the next frame, and would hide what is shown now.
    requestAnimationFrame(() => requestAnimationFrame(() => inspect(span, this.tokensOf.get(span))));
  }
}

function turn(who, content) {
  return make("div", { class: `turn ${who === "you" ? "user" : "model"}` }, make("p", { class: "who", "data-word": who, text: t(who) }), content);
}
