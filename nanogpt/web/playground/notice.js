// What stands between the visitor and an answer, in clear words: loading, limited (with a countdown), unreachable, cut
// off, refused. Where waiting helps, it looks at /ready by itself and says when the server is there again.

import { address } from "./api.js";
import { byId, make } from "./dom.js";
import { inEachLanguage, t } from "./i18n.js";

// Failures that pass by themselves: the server says when, or /ready tells.
const WAITING = new Set(["loading", "draining", "unhealthy", "unreachable", "engine_died", "model_changed", "unavailable"]);
const LIMITED = new Set(["rate_limited", "tokens_limited", "concurrency_limit", "queue_full"]);
const LOOK_AGAIN_MS = 1500;

let now = null; // {kind, said, until}
let timer = 0;
const watchers = [];

/** Called with {state, wait}: the server's state where it is known, the seconds until a run makes sense. */
export const watch = (watcher) => watchers.push(watcher);
const tell = (news) => watchers.forEach((watcher) => watcher(news));

export function show(failure) {
  clearTimeout(timer);
  now = { ...failure, kind: failure.kind, until: Date.now() + 1000 * failure.retryAfter };
  if (LIMITED.has(now.kind)) tick();
  else draw();
  if (WAITING.has(now.kind)) lookAgain();
}

export function clear() {
  clearTimeout(timer);
  now = null;
  tell({ wait: 0 });
  draw();
}

const left = () => Math.max(0, Math.ceil((now.until - Date.now()) / 1000));

function tick() {
  draw();
  tell({ wait: left() });
  if (left() > 0) {
    timer = setTimeout(tick, 250);
  } else {
    now = { kind: "go" };
    draw();
  }
}

/** How the server is: its own word for it, or "unreachable". */
export async function look() {
  try {
    const response = await fetch(address("health"), { cache: "no-store", credentials: "omit" });
    const body = await response.json();
    return body.status === "healthy" ? "ready" : body.status;
  } catch {
    return "unreachable";
  }
}

async function lookAgain() {
  const state = await look();
  tell({ state });
  if (!now || !WAITING.has(now.kind)) return;
  if (state === "ready") {
    now = now.kind === "engine_died" ? now : { kind: "back" };
    draw();
    if (now.kind === "back") timer = setTimeout(clear, 4000);
    return;
  }
  // The answer that broke off is of more interest than how the server is since then.
  if (now.kind !== "engine_died" && now.kind !== state) {
    now = { kind: state };
    draw();
  }
  timer = setTimeout(lookAgain, LOOK_AGAIN_MS);
}

function words() {
  const { kind, said, remedy } = now;
  if (kind === "local") return [said];
  const own = t(`notice.${kind}`, { s: LIMITED.has(kind) ? left() : 0 });
  if (own !== `notice.${kind}`) return [own];
  return [t(now.begun ? "notice.broken" : "notice.refused"), [said || kind, remedy].filter(Boolean).join(" ")];
}

function draw() {
  const box = byId("notice");
  box.hidden = !now;
  if (!now) return;
  box.dataset.kind = now.kind === "back" || now.kind === "go" ? "good" : WAITING.has(now.kind) || LIMITED.has(now.kind) ? "wait" : "bad";
  const [lead, detail] = words();
  // A countdown is read out once, not every second.
  box.setAttribute("aria-live", LIMITED.has(now.kind) && box.dataset.of === now.kind ? "off" : "polite");
  box.dataset.of = now.kind;
  if (box.textContent !== lead + (detail ? ` ${detail}` : "")) {
    box.replaceChildren(make("strong", { text: lead }), ...(detail ? [` ${detail}`] : []));
  }
}

inEachLanguage(() => now && draw());
