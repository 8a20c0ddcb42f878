// The page's middle: what is typed and pressed, and who is told of it.

import { Failure, askJson, hasKey, needsKey, setKey } from "./api.js";
import { programs } from "./code.js";
import { Column } from "./column.js";
import { Controls } from "./controls.js";
import { byId, make } from "./dom.js";
import { apply, currentLanguage, inEachLanguage, number, setLanguage, t } from "./i18n.js";
import { hide } from "./inspector.js";
import * as notice from "./notice.js";
import { recall, remember } from "./remember.js";
import { DEFAULTS, chatRequest, drawSeed, textRequest } from "./request.js";
import { makeTabs } from "./tabs.js";

const columns = ["A", "B"].map((name) => new Column(name, { ...DEFAULTS }, { onKeep: keepSeed, onModel: modelChosen }));
const controls = new Controls(byId("settings"), changed);
let mode = "text";
let edited = columns[0]; // whose settings the panel shows
let running = null; // the AbortController of the answers under way
let asked = null; // the last prompt or message
let info = null; // the default model's card
let cards = new Map(); // of all models by name, the default first, once they are known
let limits = null; // of /generate, as the server describes it
let served = "loading";
let wait = 0;

const compared = () => byId("compare").checked;
const active = () => (compared() ? columns : columns.slice(0, 1));
const prompt = byId("prompt");
const card = () => cards.get(edited.model) ?? info;

// -- running ------------------------------------------------------------------------------------------------------

async function run(again = false) {
  if (running || wait > 0) return;
  const text = again && mode === "text" ? asked : prompt.value;
  if (!again && text === "") return notice.show(new Failure("empty"));
  if (controls.problem) return notice.show(new Failure("local", { message: controls.problem }));
  notice.clear();
  controls.mark("");
  running = new AbortController();
  asked = text;
  // A column without a seed gets the other one's, or both get the same fresh one: what differs is then what was chosen.
  const seed = active().map((column) => column.settings.seed).find((each) => each !== null) ?? drawSeed();
  const options = { signal: running.signal, probabilities: byId("colour").checked, seed };
  if (mode === "chat" && !again) prompt.value = "";
  buttons();
  const ended = await Promise.allSettled(active().map((column) =>
    mode === "text" ? column.continue(text, options) : column.reply(again ? null : text, options)));
  running = null;
  buttons();
  byId("spoken").textContent = active().filter((column) => column.run).map((column) => column.said).join(" ");
  const index = ended.findIndex((end) => end.status === "rejected");
  if (index >= 0) fail(ended[index].reason, again ? null : text, active()[index]);
  else if (served !== "ready") refresh();
}

function fail(error, text, column) {
  if (!(error instanceof Failure)) throw error;
  error.begun = active().some((column) => column.run?.written);
  if (mode === "chat" && text !== null) {
    for (const column of active()) column.takeBack();
    if (!error.begun) prompt.value = text;
  }
  if (error.kind === "invalid_api_key") {
    served = "locked";
    if (hasKey()) error.kind = "wrong_key";
    openKey(true);
  }
  if (["cut_off", "model_not_found"].includes(error.kind)) refresh();
  // The page watches how the default model is; what another one lacks, the server says.
  if (column.model && ["loading", "unhealthy", "engine_died"].includes(error.kind)) error.kind = "other_model";
  controls.mark(error.field);
  notice.show(error);
  changed();
}

function stop() {
  if (!running) return;
  running.abort();
  prompt.focus();
}

function buttons() {
  const word = mode === "chat" ? "send" : "run";
  byId("run").textContent = wait > 0 ? t("run.wait", { s: wait }) : t(word);
  byId("run").disabled = running !== null || wait > 0;
  byId("stop").disabled = running === null;
  for (const column of columns) column.models.disabled = running !== null;
  byId("again").disabled = running !== null || wait > 0 || (mode === "text" ? asked === null : !columns[0].messages.length);
  document.body.classList.toggle("running", running !== null);
}

// -- what is shown -----------------------------------------------------------------------------------------------

/** A setting, the prompt or the server's state has changed. */
function changed() {
  const [a, b] = columns;
  a.summarise(compared() ? b.settings : null);
  b.summarise(a.settings);
  const most = limits?.prompt?.maxLength;
  byId("count").textContent = mode === "text" && most ? t("count", { n: number([...prompt.value].length), limit: number(most) }) : "";
  byId("count").classList.toggle("over", mode === "text" && most !== undefined && [...prompt.value].length > most);
  byId("served").dataset.state = served;
  byId("served-name").textContent = info?.name ?? "";
  byId("served-state").textContent = t(`state.${served}`);
  byId("copy-other").textContent = t("which.copy", { name: edited === a ? "B" : "A" });
  byId("prompt-label").textContent = t(mode === "chat" ? "message" : "prompt");
  byId("colour").closest("label").classList.toggle("on", byId("colour").checked);
  showCode();
  buttons();
}

function showCode() {
  const probabilities = byId("colour").checked;
  const { wanted, messages } = edited;
  const said = prompt.value || (mode === "chat" && messages.length ? null : "Once upon a time");
  const request = mode === "text"
    ? textRequest(prompt.value || "Once upon a time", wanted, probabilities)
    : chatRequest(said ? [...messages, { role: "user", content: said }] : messages.slice(0, lastQuestion(messages)), wanted, probabilities);
  const texts = programs(request, info?.name ?? "default", needsKey());
  byId("snippets").replaceChildren(...Object.entries(texts).map(([name, text]) => {
    const code = make("code", { text });
    const heading = make("h3", { text: name });
    return make("section", { class: "snippet", "data-program": name },
      make("div", { class: "head" }, heading,
        make("button", { type: "button", class: "quiet", text: t("code.copy"), "aria-label": `${t("code.copy")}: ${name}`, click: (event) => copy(event.target, code) })),
      make("pre", { tabindex: "0", "aria-label": name, role: "group" }, code));
  }));
}

const lastQuestion = (messages) => messages.findLastIndex((message) => message.role === "user") + 1;

async function copy(button, code) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = t("code.copied");
  } catch { // no clipboard where the page came by plain HTTP
    getSelection().selectAllChildren(code);
    button.textContent = t("code.selected");
  }
  setTimeout(() => { button.textContent = t("code.copy"); }, 2000);
}

function showCard() {
  const info = card();
  const value = {
    name: info?.name, family: info?.family, parameters: info?.parameters && number(info.parameters),
    context: info?.context && t("card.tokens", { n: number(info.context) }),
    shape: info?.layers && t("card.shape.value", info),
    vocabulary: info?.vocabulary && t("card.tokens", { n: number(info.vocabulary) }),
    tokenizer: info?.tokenizer, has_chat_template: info && t(info.has_chat_template ? "yes" : "no"),
    step: info?.step && t("card.steps", { n: number(info.step) }),
    recorded_loss: info?.recorded_loss && number(info.recorded_loss, 4),
    device: info?.device, precision: info?.precision, runner: info?.runner, digest: info?.digest?.slice(0, 12),
  };
  const known = Object.entries(value).filter(([, text]) => text);
  byId("card").replaceChildren(...(known.length ? known : [["none", ""]]).map(([name, text]) =>
    make("div", {}, make("dt", { text: t(`card.${name}`) }), make("dd", { text }))));
}

// -- the server --------------------------------------------------------------------------------------------------

/** Ask again what is served; says so where that is not possible. */
async function refresh() {
  try {
    limits ??= (await askJson("openapi.json")).components.schemas.GenerateBody.properties;
    const state = await notice.look();
    if (state !== "ready") throw new Failure(state);
    info = await askJson("model_info");
    served = "ready";
    offerModels();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.kind === "invalid_api_key") {
      served = "locked";
      if (hasKey()) error.kind = "wrong_key";
      openKey(true);
    } else if (["loading", "draining", "unhealthy"].includes(error.kind)) served = error.kind;
    else served = "unreachable";
    if (!running) notice.show(error);
  }
  showModel();
}

/** Ask which models there are, and let each column choose. A second one that still loads is waited for, by nobody. */
async function offerModels() {
  try {
    const names = (await askJson("v1/models")).data.map((model) => model.id);
    const told = await Promise.all(names.slice(1).map((name) => askJson(`model_info?model=${encodeURIComponent(name)}`)));
    cards = new Map([[names[0], info], ...told.map((each, i) => [names[i + 1], each])]);
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    return; // the page does without
  }
  if (running) return; // the next time
  for (const column of columns) column.offer([...cards.keys()]);
  showModel();
}

/** Another model, or another column's, is the one that the panel is about. */
function showModel() {
  byId("modes").hidden = ![info, ...cards.values()].some((each) => each?.has_chat_template);
  controls.limit(limits, card());
  showCard();
  changed();
}

notice.watch((news) => {
  if (news.wait !== undefined) {
    wait = news.wait;
    buttons();
  }
  if (news.state && news.state !== served && !(news.state === "ready" && served === "locked")) {
    served = news.state;
    if (news.state === "ready") refresh();
    else changed();
  }
});

// -- what is pressed ---------------------------------------------------------------------------------------------

function setMode(chosen) {
  mode = chosen;
  stop();
  asked = null;
  for (const column of columns) column.clear();
  const composer = byId("composer");
  if (mode === "chat") byId("answers").after(composer);
  else byId("answers").before(composer);
  controls.system.hidden = mode !== "chat";
  byId("new-chat").hidden = mode !== "chat";
  document.body.classList.toggle("chat", mode === "chat");
  prompt.value = "";
  prompt.rows = mode === "chat" ? 2 : 4;
  changed();
}

function setCompare() {
  stop();
  const [a, b] = columns;
  if (compared()) Object.assign(b.settings, a.settings);
  if (compared()) b.clear();
  if (compared()) b.choose([...cards.keys()].find((name, i) => i && name !== a.model) ?? null);
  if (compared() && mode === "chat") a.clear();
  byId("which").hidden = !compared();
  byId("answers").replaceChildren(...active().map((column) => column.element));
  byId("answers").classList.toggle("two", compared());
  for (const column of columns) column.label(!compared());
  edit(compared() ? b : a);
}

function edit(column) {
  edited = column;
  byId("which").querySelector(`[value=${column.name}]`).checked = true;
  controls.show(column.settings);
  showModel();
}

/** A conversation is not carried on by another model: both begin anew. */
function modelChosen(column) {
  if (mode === "chat") setMode("chat");
  edit(compared() ? column : columns[0]);
}

function keepSeed(column, seed) {
  column.settings.seed = seed;
  if (column === edited) controls.show(column.settings);
  changed();
}

function openKey(open) {
  byId("key-panel").hidden = !open;
  byId("key-button").setAttribute("aria-expanded", String(open));
  if (open) byId("key").focus();
}

function setColour() {
  document.body.classList.toggle("plain", !byId("colour").checked);
  byId("legend").hidden = !byId("colour").checked;
  hide();
  changed();
}

const THEMES = [null, "light", "dark"];
function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(recall("theme")) + 1) % THEMES.length];
  remember("theme", theme);
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  themeWord();
}
const themeWord = () => { byId("theme").textContent = t(`theme.${document.documentElement.dataset.theme ?? "auto"}`); };

byId("run").addEventListener("click", () => run());
byId("again").addEventListener("click", () => run(true));
byId("stop").addEventListener("click", stop);
byId("new-chat").addEventListener("click", () => setMode("chat"));
byId("compare").addEventListener("change", setCompare);
byId("colour").addEventListener("change", setColour);
byId("theme").addEventListener("click", nextTheme);
byId("language").addEventListener("click", () => setLanguage(currentLanguage() === "zh" ? "en" : "zh"));
byId("key-button").addEventListener("click", () => openKey(byId("key-panel").hidden));
byId("key").addEventListener("change", () => {
  setKey(byId("key").value);
  notice.clear();
  refresh();
});
byId("key").addEventListener("keydown", (event) => {
  if (event.key === "Enter") byId("key").blur();
});
byId("modes").addEventListener("change", (event) => setMode(event.target.value));
byId("which").addEventListener("change", (event) => edit(columns.find((column) => column.name === event.target.value)));
byId("copy-other").addEventListener("click", () => {
  const other = columns.find((column) => column !== edited);
  Object.assign(edited.settings, other.settings);
  edit(edited);
});
prompt.addEventListener("input", changed);
document.addEventListener("keydown", (event) => {
  if (event.isComposing) return; // an input method is being used
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  }
  if (event.key === "Escape") {
    hide();
    stop();
  }
});

makeTabs(byId("tab-settings").parentElement);
apply();
setCompare();
inEachLanguage(() => {
  document.title = `${t("playground")} · nano-gpt-api`;
  byId("language").textContent = currentLanguage() === "zh" ? "English" : "中文";
  byId("language").lang = currentLanguage() === "zh" ? "en" : "zh";
  themeWord();
  showCard();
  changed();
});
refresh();
