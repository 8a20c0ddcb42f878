// Requests to the server that served this page. The key lives in this module's variable, in this tab, and nowhere else.

let key = "";
let keyWanted = false;

export const setKey = (value) => {
  key = value.trim();
};
export const hasKey = () => key !== "";
/** Whether programs will need a key: one was typed, or the server asked for one. */
export const needsKey = () => keyWanted || hasKey();
/** The address of a route, below wherever this page lies. */
export const address = (path) => new URL(path, document.baseURI).href;

/** A refusal, or a failure on the way. `kind`: the server's code, or unreachable, cut_off, bad_answer. */
export class Failure extends Error {
  constructor(kind, { message = "", remedy = "", field = "", retryAfter = 0, limit = "" } = {}) {
    super(message || kind);
    Object.assign(this, { kind, said: message, remedy, field, retryAfter, limit });
  }
}

/** What the server said, in whichever of its two forms. */
export function failure(body, headers) {
  const of = typeof body?.error === "object" ? body.error : { ...body, message: body?.error, param: body?.field };
  return new Failure(of?.code ?? "bad_answer", {
    message: of?.message ?? "",
    remedy: of?.remedy ?? "",
    field: of?.param ?? "",
    retryAfter: Number(headers?.get("Retry-After")) || 0,
    limit: headers?.get("RateLimit-Policy") ?? "",
  });
}

/** The response, if it is one of success. Throws: Failure, or AbortError when `signal` says so. */
export async function ask(path, { body, signal } = {}) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers["X-API-Key"] = key;
  let response;
  try {
    response = await fetch(address(path), {
      method: body ? "POST" : "GET",
      headers: { Accept: "application/json, text/event-stream", ...headers },
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
      referrerPolicy: "no-referrer",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof TypeError && /header|ISO-8859|ByteString/i.test(error.message)) {
      throw new Failure("invalid_api_key"); // a key that no header can carry
    }
    throw new Failure("unreachable");
  }
  if (response.ok) return response;
  if (response.status === 401) keyWanted = true;
  let said = null;
  try {
    said = await response.json();
  } catch {
    // A proxy's page, or nothing: the status has to do.
  }
  if (!said?.error) throw new Failure("bad_answer", { message: `HTTP ${response.status}` });
  throw failure(said, response.headers);
}

export async function askJson(path) {
  const response = await ask(path);
  try {
    return await response.json();
  } catch {
    throw new Failure("unreachable");
  }
}
