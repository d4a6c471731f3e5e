// Requests to the server, and its event streams.

import { at } from "./dom.js";

export function headers(more) {
  const key = at("key").value.trim();
  return { ...(key ? { authorization: `Bearer ${key}` } : {}), ...more };
}

export function post(path, body, more = {}, signal = undefined) {
  return fetch(path, {
    method: "POST",
    headers: headers({ "content-type": "application/json", ...more }),
    body: JSON.stringify(body),
    signal,
  });
}

export async function failure(response) {
  if (!response) return "the server does not answer";
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// The JSON of each event of a stream: any line ends, comments and several data lines an event are legal.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) {
        data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
      } else if (line === "" && data.length) {
        const text = data.join("\n");
        data = [];
        if (text === "[DONE]") return;
        const event = JSON.parse(text);
        if (event.error) throw new Error(event.error.message);
        yield event;
      }
    }
  }
}
