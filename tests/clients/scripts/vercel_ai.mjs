// The AI SDK with @ai-sdk/openai-compatible.

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateText, jsonSchema, streamText, tool } from 'ai';
import { BASE_URL, QUESTION, WEATHER, WEATHER_QUESTION, report } from './report.mjs';

const cortex = createOpenAICompatible({ name: 'cortex', baseURL: `${BASE_URL}/v1` });
const tools = {
  [WEATHER.name]: tool({ description: WEATHER.description, inputSchema: jsonSchema(WEATHER.parameters) }),
};
const asked = (model, prompt) => ({ model: cortex(model), prompt, maxRetries: 0 });

async function texts({ fullStream }) {
  const pieces = [];
  for await (const part of fullStream) {
    if (part.type === 'error') throw part.error;
    if (part.type === 'text-delta') pieces.push(part.text);
  }
  return pieces;
}

await report({
  stream: (model) => texts(streamText(asked(model, QUESTION))),
  async plain(model) {
    return (await generateText(asked(model, QUESTION))).text;
  },
  async toolStream(model) {
    const result = streamText({ ...asked(model, WEATHER_QUESTION), tools });
    await texts(result);
    const [call] = await result.toolCalls;
    return [call.toolName, call.input];
  },
  async toolPlain(model) {
    const { toolCalls } = await generateText({ ...asked(model, WEATHER_QUESTION), tools });
    return [toolCalls[0].toolName, toolCalls[0].input];
  },
});
