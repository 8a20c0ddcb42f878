// Server-sent events to pieces of text with their tokens, the same for /generate and for chats.

import { Failure, failure } from "./api.js";

/**
 * Yields {text, tokens, end}. `tokens`: {text, logprob, bytes, top}, where they were asked for. `end`: {reason, tokens}
 * in the last one. Throws: Failure; cut_off when the stream ends before it said that it would.
 */
export async function* pieces(response) {
  let ended = false;
  for await (const { name, data } of events(response.body)) {
    if (name === "error") throw failure(data);
    if (data.error) throw failure(data);
    const piece = data.choices ? chatPiece(data) : plainPiece(data);
    if (piece.end) ended = true;
    yield piece;
  }
  if (!ended) throw new Failure("cut_off");
}

/** Source: the WHATWG HTML standard, section 9.2, as far as this server uses it. */
async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      buffer += decoder.decode(value, { stream: true });
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        const event = { name: "message", data: null };
        let data = "";
        for (const line of block.split("\n")) {
          if (line.startsWith("event: ")) event.name = line.slice(7);
          else if (line.startsWith("data: ")) data += line.slice(6);
        }
        if (!data || data === "[DONE]") continue; // a ping, or the end, which the last chunk has told
        event.data = JSON.parse(data);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("cut_off");
  }
}

function plainPiece(data) {
  if (data.finish_reason) {
    return { text: "", tokens: [], end: { reason: data.finish_reason, tokens: data.tokens_generated } };
  }
  const tokens = (data.logprobs ?? []).map((token) => ({ ...token, bytes: bytesOf(token.text) }));
  return { text: data.text, tokens };
}

function chatPiece(data) {
  const choice = data.choices[0];
  if (!choice) return { text: "", tokens: [] };
  const tokens = (choice.logprobs?.content ?? []).map((token) => ({
    text: token.token,
    logprob: token.logprob,
    bytes: Uint8Array.from(token.bytes),
    top: token.top_logprobs.map((other) => ({ text: other.token, logprob: other.logprob })),
  }));
  const end = choice.finish_reason ? { reason: choice.finish_reason } : undefined;
  return { text: choice.delta?.content ?? "", tokens, end };
}

const encoder = new TextEncoder();

/** The bytes of a token as the API tells it: a part of a character is written `bytes:\xe4\xb8`. */
export function bytesOf(text) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(text)) return encoder.encode(text);
  return Uint8Array.from(text.slice(8).split("\\x"), (hex) => parseInt(hex, 16));
}
