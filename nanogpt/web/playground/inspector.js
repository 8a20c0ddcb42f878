// What stands beside the token that is pointed at: its probability, its rank, and what else could have been there.

import { byId, make } from "./dom.js";
import { percent, t } from "./i18n.js";
import { visible } from "./tokens.js";

const GAP = 10;
let shown = null;

export function inspect(span, tokens) {
  if (shown === span) return;
  hide();
  shown = span;
  span.classList.add("active");
  const box = byId("inspector");
  box.replaceChildren(...tokens.map(describe));
  box.hidden = false;
  place(box, span.getClientRects()[0] ?? span.getBoundingClientRect());
}

export function hide() {
  shown?.classList.remove("active");
  shown = null;
  byId("inspector").hidden = true;
}

export const inspected = () => shown;

function describe(token) {
  const p = Math.exp(token.logprob);
  const rank = token.rank ?? token.top.findIndex((other) => other.text === token.text) + 1;
  const head = make("p", { class: "of" },
    make("code", { text: visible(token.text) }),
    make("span", { text: t("token.probability", { p: percent(p) }) }),
    rank ? make("span", { class: "hint", text: t("token.rank", { n: rank }) }) : null);
  const rows = token.top.map((other) => bar(other, other.text === token.text));
  if (rows.length && !token.top.some((other) => other.text === token.text)) rows.push(bar(token, true));
  return make("div", {}, head,
    make("p", { class: "hint", text: t(rows.length ? "token.others" : "token.none") }),
    make("ol", {}, ...rows));
}

function bar(other, chosen) {
  const p = Math.exp(other.logprob);
  const fill = make("span", { class: "fill" });
  fill.style.width = `${Math.max(1, p * 100)}%`;
  return make("li", { class: chosen ? "chosen" : null },
    make("code", { text: visible(other.text) }),
    make("span", { class: "bar", "aria-hidden": "true" }, fill),
    make("span", { class: "p", text: percent(p) }));
}

/** Below the token or above it, wherever there is room, and within the window. */
function place(box, at) {
  box.style.left = "0";
  box.style.top = "0";
  const { width, height } = box.getBoundingClientRect();
  const left = Math.max(GAP, Math.min(at.left, document.documentElement.clientWidth - width - GAP));
  const below = at.bottom + GAP + height <= window.innerHeight;
  const top = below ? at.bottom + GAP : Math.max(GAP, at.top - height - GAP);
  box.style.left = `${left + window.scrollX}px`;
  box.style.top = `${top + window.scrollY}px`;
}

addEventListener("resize", hide);
