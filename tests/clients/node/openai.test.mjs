// OpenAI's client for Node at a running server: EPD_BASE_URL, EPD_MODEL; EPD_PICTURE is a data: URL of a circle.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const model = process.env.EPD_MODEL;
const self = "I am epd demo, a tiny model that sees pictures.";
const messages = [{ role: "user", content: "Who are you?" }];
const client = new OpenAI({ baseURL: process.env.EPD_BASE_URL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const Trip = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });

test("chat", async () => {
  const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
  assert.equal(answer.choices[0].message.content, self);
  assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
});

test("stream", async () => {
  const stream = await client.chat.completions.create({
    model, messages, temperature: 0, stream: true, stream_options: { include_usage: true },
  });
  let text = "";
  let last;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    last = chunk;
  }
  assert.equal(text, self);
  assert.ok(last.usage.completion_tokens > 0);
});

test("stream helper", async () => {
  const runner = client.chat.completions.stream({ model, messages, temperature: 0 });
  let text = "";
  runner.on("content", (delta) => { text += delta; });
  assert.equal(await runner.finalContent(), self);
  assert.equal(text, self);
});

test("picture", async () => {
  const content = [
    { type: "image_url", image_url: { url: process.env.EPD_PICTURE } },
    { type: "text", text: "What shape is it?" },
  ];
  const answer = await client.chat.completions.create({ model, messages: [{ role: "user", content }], temperature: 0 });
  assert.equal(answer.choices[0].message.content, "circle");
});

const tools = {
  model, messages, max_tokens: 200, temperature: 0, tool_choice: "required", parallel_tool_calls: false,
  tools: [zodFunction({ name: "trip", parameters: Trip })],
};

test("tools", async () => {
  const answer = await client.chat.completions.parse(tools);
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, "trip");
  Trip.parse(call.function.parsed_arguments);
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
});

test("streamed tools", async () => {
  const answer = await client.chat.completions.stream(tools).finalChatCompletion();
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, "trip");
  Trip.parse(JSON.parse(call.function.arguments));
});

test("run tools", async () => {
  // The helper asks again with what the function returned, and takes that answer.
  let trips = 0;
  const runner = client.chat.completions.runTools({
    ...tools,
    tool_choice: { type: "function", function: { name: "trip" } },
    tools: [zodFunction({ name: "trip", parameters: Trip, function: (trip) => { trips += 1; return trip.city; } })],
  });
  await runner.done();
  assert.equal(trips, 1);
  assert.ok(["Paris", "Rome"].includes(await runner.finalFunctionToolCallResult()));
});

test("parse", async () => {
  const answer = await client.chat.completions.parse({
    model, messages, max_tokens: 200, temperature: 0, response_format: zodResponseFormat(Trip, "trip"),
  });
  Trip.parse(answer.choices[0].message.parsed);
});

test("completions, embeddings and models", async () => {
  const prompt = `<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n`;
  const text = await client.completions.create({ model, prompt, max_tokens: 40, temperature: 0 });
  assert.equal(text.choices[0].text, self);
  const vectors = await client.embeddings.create({ model, input: ["a circle", "two squares"] });
  assert.equal(vectors.data.length, 2);
  assert.ok(vectors.data[1].embedding.length > 10);
  const models = [];
  for await (const one of client.models.list()) models.push(one.id);
  assert.deepEqual(models, [model]);
});

test("errors", async () => {
  await assert.rejects(client.chat.completions.create({ model: "nobody", messages }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    assert.ok(error.requestID);
    return true;
  });
  await assert.rejects(client.chat.completions.create({ model, messages, temperature: -1 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  const long = { model, prompt: "x", max_tokens: 3000, ignore_eos: true };
  await assert.rejects(client.completions.create(long, { timeout: 100 }), OpenAI.APIConnectionTimeoutError);
});
