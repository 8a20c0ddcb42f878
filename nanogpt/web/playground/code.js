// The request as programs that send it: curl, Python with OpenAI's client, JavaScript. The key is never written out.

import { address } from "./api.js";

/** {curl, Python, JavaScript}: texts of programs. `keyed`: they take the key from the variable API_KEY. */
export function programs(request, model, keyed) {
  return { curl: curl(request, keyed), Python: python(request, model, keyed), JavaScript: javascript(request, keyed) };
}

function curl({ path, body }, keyed) {
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const key = keyed ? `  -H "X-API-Key: $API_KEY" \\\n` : "";
  return `curl -N ${address(path)} \\\n  -H 'Content-Type: application/json' \\\n${key}  -d '${data}'\n`;
}

// What OpenAI's client has no argument for.
const EXTRA = new Set(["top_k", "min_p", "repetition_penalty"]);
const RENAMED = { max_length: "max_tokens" };

function python({ path, body }, model, keyed) {
  const isChat = path.includes("chat");
  const plain = [["model", body.model ?? model]];
  const extra = {};
  for (const [name, value] of Object.entries(body)) {
    if (name === "model") continue;
    if (EXTRA.has(name)) extra[name] = value;
    else plain.push([RENAMED[name] ?? name, value]);
  }
  if (Object.keys(extra).length) plain.push(["extra_body", extra]);
  const lines = plain.map(([name, value]) => `    ${name}=${pythonValue(value)},\n`).join("");
  const call = isChat ? "client.chat.completions.create" : "client.completions.create";
  const piece = isChat ? 'chunk.choices[0].delta.content or ""' : "chunk.choices[0].text";
  return (
    `${keyed ? "import os\n\n" : ""}from openai import OpenAI\n\n` +
    `client = OpenAI(base_url="${address("v1")}", api_key=${keyed ? 'os.environ["API_KEY"]' : '"none"'})\n` +
    `stream = ${call}(\n${lines})\nfor chunk in stream:\n    print(${piece}, end="", flush=True)\n`
  );
}

function pythonValue(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) return `[${value.map(pythonValue).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonValue(item)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

function javascript({ path, body }, keyed) {
  const data = JSON.stringify(body, null, 2).replaceAll("\n", "\n  ");
  const key = keyed ? ', "X-API-Key": API_KEY' : "";
  const piece = path.includes("chat") ? 'data.choices[0]?.delta.content ?? ""' : 'data.finish_reason ? "" : data.text';
  return `${keyed ? "const API_KEY = process.env.API_KEY;\n" : ""}const response = await fetch("${address(path)}", {
  method: "POST",
  headers: { "Content-Type": "application/json"${key} },
  body: JSON.stringify(${data}),
});
if (!response.ok) throw new Error(await response.text());
let text = "", buffer = "";
for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
  const events = (buffer + part).split("\\n\\n");
  buffer = events.pop();
  for (const event of events) {
    if (event.startsWith("event: error")) throw new Error(event);
    if (!event.startsWith("data: {")) continue;
    const data = JSON.parse(event.slice(6));
    text += ${piece};
  }
}
console.log(text);
`;
}
