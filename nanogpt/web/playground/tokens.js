// Pieces of text and the tokens that they are made of, brought together: a run of text for each token, or for the few
// tokens that make up one character. Knows no page.

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Text and tokens do not come in step: text that may be the beginning of a stop text is held back by the server. */
export class Aligner {
  #text = "";
  #tokens = [];

  /** Runs of text whose tokens are certain: [{text, tokens}]. What is left is `rest`. */
  push(text, tokens) {
    this.#text += text;
    this.#tokens.push(...tokens);
    const runs = [];
    while (this.#text && this.#tokens.length) {
      const count = this.#whole();
      if (!count) break;
      const run = decode(this.#tokens.slice(0, count));
      if (this.#text.startsWith(run)) {
        if (run) runs.push({ text: run, tokens: this.#tokens.slice(0, count) });
        this.#text = this.#text.slice(run.length);
        this.#tokens.splice(0, count);
      } else if (run.startsWith(this.#text)) {
        break; // the end of this token is still held back
      } else {
        runs.push(...this.end()); // bytes that are no text: what they were shown as has other lengths
      }
    }
    return runs;
  }

  /** Text that has come without a token that is known to be its own. */
  get rest() {
    return this.#text;
  }

  /** What is left at the end, as one run. Tokens of a stop text have no text, and are left out. */
  end() {
    if (!this.#text) return [];
    const run = { text: this.#text, tokens: this.#whole() === 1 ? this.#tokens.slice(0, 1) : this.#tokens };
    this.#text = "";
    this.#tokens = [];
    return [run];
  }

  /** How many of the first tokens are whole characters; 0: there are not enough of them. */
  #whole() {
    for (let count = 1; count <= Math.min(4, this.#tokens.length); count += 1) {
      if (decode(this.#tokens.slice(0, count)) !== null) return count;
    }
    return this.#tokens.length >= 4 ? this.#tokens.length : 0;
  }
}

function decode(tokens) {
  const bytes = tokens.flatMap((token) => [...token.bytes]);
  try {
    return strict.decode(Uint8Array.from(bytes));
  } catch {
    return null;
  }
}

/** 0 for tokens that were likely, 4 for those that were a surprise. Of a run the least likely token counts. */
export function surprise(tokens) {
  const p = Math.exp(Math.min(...tokens.map((token) => token.logprob)));
  return p >= 0.5 ? 0 : p >= 0.2 ? 1 : p >= 0.05 ? 2 : p >= 0.01 ? 3 : 4;
}

/** A token's text where white space has to be seen. */
export function visible(text) {
  if (text === "") return "∅";
  return text.replace(/^bytes:/, "").replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣");
}
