// What is sent for given settings: the one place that knows the fields of /generate and of chats. Knows no page.

/** As the controls begin. `seed` null: a fresh one each time. `logprobs`: alternatives a token. Beside them settings may
    have a `model`; null is the server's default. */
export const DEFAULTS = {
  max_length: 100, temperature: 0.8, top_k: 50, top_p: 1, min_p: 0, seed: null, repetition_penalty: 1,
  presence_penalty: 0, frequency_penalty: 0, stop: [], logit_bias: {}, logprobs: 5, system: "",
};

/** Sent only where it differs: these mean "off" on every route. */
const OFF = { top_p: 1, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };

export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** {path, body} of the request. `seed` null is left out: programs draw their own. */
export function textRequest(prompt, settings, probabilities) {
  const body = { prompt, max_length: settings.max_length, ...sampling(settings) };
  if (probabilities) body.logprobs = settings.logprobs;
  return { path: "generate", body: { ...body, stream: true } };
}

export function chatRequest(messages, settings, probabilities) {
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const body = { messages: [...system, ...messages], max_completion_tokens: settings.max_length, ...sampling(settings) };
  if (probabilities) Object.assign(body, { logprobs: true, top_logprobs: settings.logprobs });
  return { path: "v1/chat/completions", body: { ...body, stream: true } };
}

function sampling(settings) {
  const fields = { temperature: settings.temperature, top_k: settings.top_k };
  if (settings.model) fields.model = settings.model;
  for (const [name, off] of Object.entries(OFF)) if (settings[name] !== off) fields[name] = settings[name];
  if (settings.seed !== null) fields.seed = settings.seed;
  if (settings.stop.length) fields.stop = settings.stop;
  if (Object.keys(settings.logit_bias).length) fields.logit_bias = settings.logit_bias;
  return fields;
}
