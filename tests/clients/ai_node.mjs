// Vercel's AI SDK. Run in a folder where `npm install ai @ai-sdk/openai-compatible @ai-sdk/openai @ai-sdk/anthropic zod`
// was run.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { createRequire } from "node:module";

const [url] = process.argv.slice(2);
const require = createRequire(join(process.cwd(), "here.js"));
const load = async (name) => import(pathToFileURL(require.resolve(name)).href);
const { generateText, streamText, Output, tool, embed } = await load("ai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { z } = await load("zod");
const version = JSON.parse(readFileSync(join(process.cwd(), "node_modules/ai/package.json"))).version;

const compatible = createOpenAICompatible({
  name: "here",
  baseURL: `${url}/v1`,
  apiKey: "none",
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" });
const anthropic = createAnthropic({ baseURL: `${url}/v1`, apiKey: "none" });
const schema = z.object({ city: z.enum(["Bonn", "Rome"]), days: z.number().int().min(1).max(9) });
const called = [];
const weather = tool({
  description: "The weather of a city.",
  inputSchema: schema,
  execute: async (given) => {
    called.push(given);
    return "rain";
  },
});

const checkWeather = (given) => schema.parse(given);
const one = { here: { parallel_tool_calls: false }, openai: { parallelToolCalls: false } };
const providerOptions = { ...one, anthropic: { disableParallelToolUse: true } };
const asked = { prompt: "hello", maxRetries: 0, providerOptions };
const required = { ...asked, tools: { weather }, toolChoice: "required", maxOutputTokens: 200 };

async function callWith(model) {
  called.length = 0;
  const { toolCalls } = await generateText({ ...required, model });
  for (const call of toolCalls) checkWeather(call.input);
  if (!called.length) throw new Error("no call");
}

const cases = {
  chat: async () => {
    const { text } = await generateText({ ...asked, model: compatible("red"), maxOutputTokens: 8 });
    if (!text) throw new Error("no text");
  },
  stream: async () => {
    let parts = 0;
    for await (const _ of streamText({ ...asked, model: compatible("red"), maxOutputTokens: 8 }).textStream) parts++;
    if (parts < 1) throw new Error(`${parts} parts`);
  },
  "JSON schema": async () => {
    const output = Output.object({ schema });
    const made = await generateText({ ...asked, model: compatible("red"), maxOutputTokens: 200, output });
    checkWeather(made.output);
  },
  tools: async () => callWith(compatible("red")),
  "streamed tools": async () => {
    const result = streamText({ ...required, model: compatible("red") });
    await result.consumeStream();
    for (const call of await result.toolCalls) checkWeather(call.input);
    if (!(await result.toolCalls).length) throw new Error("no call");
  },
  Responses: async () => callWith(openai.responses("red")),
  "Anthropic's messages": async () => callWith(anthropic("red")),
  embeddings: async () => {
    await embed({ model: compatible.textEmbeddingModel("base"), value: "hello", maxRetries: 0 });
  },
};

console.log(JSON.stringify({ version }));
for (const [name, run] of Object.entries(cases)) {
  let error = null;
  try {
    await run();
  } catch (problem) {
    error = String(problem?.responseBody ?? problem).slice(0, 500);
  }
  console.log(JSON.stringify({ case: name, error }));
}
