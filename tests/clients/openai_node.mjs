// openai for JavaScript. Run in a folder where `npm install openai` was run.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const [url] = process.argv.slice(2);
const require = createRequire(join(process.cwd(), "here.js"));
const OpenAI = require("openai").default ?? require("openai");
const version = JSON.parse(readFileSync(join(process.cwd(), "node_modules/openai/package.json"))).version;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const model = "red";
const messages = [{ role: "user", content: "hello" }];
const schema = {
  type: "object",
  properties: { city: { enum: ["Bonn", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "weather", parameters: schema, strict: true } }];
const calls = { model, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 200 };

function checkWeather(text) {
  const { city, days, ...rest } = JSON.parse(text);
  if (!["Bonn", "Rome"].includes(city) || !(days >= 1 && days <= 9) || Object.keys(rest).length) throw new Error(text);
}

const cases = {
  chat: async () => {
    const said = await client.chat.completions.create({ model, messages, max_tokens: 8 });
    if (!said.choices[0].message.content) throw new Error("no text");
  },
  stream: async () => {
    let parts = 0;
    for await (const _ of await client.chat.completions.create({ model, messages, max_tokens: 8, stream: true })) parts++;
    if (parts < 2) throw new Error(`${parts} parts`);
  },
  "JSON schema": async () => {
    const format = { type: "json_schema", json_schema: { name: "weather", schema, strict: true } };
    const said = await client.chat.completions.create({ model, messages, max_tokens: 200, response_format: format });
    checkWeather(said.choices[0].message.content);
  },
  tools: async () => {
    const said = (await client.chat.completions.create(calls)).choices[0].message;
    checkWeather(said.tool_calls[0].function.arguments);
    const result = { role: "tool", tool_call_id: said.tool_calls[0].id, content: "rain" };
    await client.chat.completions.create({ model, messages: [...messages, said, result], tools, max_tokens: 4 });
  },
  "streamed tools": async () => {
    const final = await client.chat.completions.stream(calls).finalChatCompletion();
    checkWeather(final.choices[0].message.tool_calls[0].function.arguments);
  },
  Responses: async () => {
    const tool = { type: "function", name: "weather", parameters: schema, strict: true };
    const asked = { model, input: "hello", max_output_tokens: 200, tools: [tool], tool_choice: "required" };
    const final = await client.responses.stream({ ...asked, parallel_tool_calls: false }).finalResponse();
    checkWeather(final.output[0].arguments);
  },
  embeddings: async () => {
    const made = await client.embeddings.create({ model: "base", input: "hello" });
    const length = made.data[0].embedding.reduce((sum, value) => sum + value * value, 0);
    if (Math.abs(length - 1) > 1e-3) throw new Error(`length ${length}`);
  },
};

console.log(JSON.stringify({ version }));
for (const [name, run] of Object.entries(cases)) {
  let error = null;
  try {
    await run();
  } catch (problem) {
    error = String(problem).slice(0, 500);
  }
  console.log(JSON.stringify({ case: name, error }));
}
